"""The live page: what feeds it, and what a browser makes of it."""

import re
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from fairkv_jax.engine.request import Request
from fairkv_jax.serve.history import LENGTH, History
from fairkv_jax.serve.metrics import Metrics
from fairkv_jax.serve.page import FOLDER, LISTED_PREFIXES
from tests.serve.chromium import Browser, browsing, find_chromium
from tests.serve.live import PATIENCE_S, Server, eventually, running
from tests.serve.scripted import CRASH, ScriptedEngine
from tests.serve.test_metrics import Clock, output, stats

COMPLETIONS = "/v1/completions"


def test_samples_have_rates_and_means_of_their_second():
    clock = Clock()
    metrics = Metrics(clock)
    history = History(metrics)
    history.take(10.0)
    metrics.submitted([Request("a", [1] * 10), Request("b", [1] * 10)])
    clock.now += 0.5
    metrics.stepped([output("a", 1)], stats(1, 1, used_pages=(3, 4)))
    clock.now += 0.25
    metrics.stepped([output("a", 6)], stats(1, 1, used_pages=(3, 5)))
    history.take(12.0)
    history.take(13.0)
    before, busy, idle = history.since(0)
    assert (before["running"], before["waiting"], before["used_pages"]) == (0, 0, ())
    assert (busy["running"], busy["waiting"], busy["used_pages"]) == (1, 1, (3, 5))
    assert busy["prompt_tokens_per_s"] == 10 / 2
    assert busy["generation_tokens_per_s"] == 6 / 2
    assert busy["first_token_ms"] == 500
    assert busy["interval_ms"] == 50
    assert (idle["generation_tokens_per_s"], idle["interval_ms"]) == (0, None)
    assert [sample["number"] for sample in history.since(2)] == [3]


def test_old_samples_are_forgotten():
    history = History(Metrics())
    for second in range(LENGTH + 5):
        history.take(float(second))
    assert [len(history.since(0)), history.since(0)[0]["number"]] == [LENGTH, 6]


def test_the_page_reads_only_fields_that_the_server_sends(server: Server):
    script = (FOLDER / "page.js").read_text(encoding="utf-8")
    for name in ("plan", "stats"):
        sent = server.client.get(f"/{name}").json()
        read = set(re.findall(rf"\b{name}\??\.(\w+)", script)) - {"css"}
        assert read
        assert read <= set(sent)


def test_prefixes_are_not_listed_where_they_belong_to_keys(checkpoint: Path):
    options = {"api_keys": ("one",), "open_metrics": True}
    with running(lambda: ScriptedEngine(checkpoint), **options) as server:
        prefixes = httpx.get(f"{server.url}/stats").json()["prefixes"]
    assert (prefixes["count"], prefixes["recent"]) == (12, [])


def test_plan_and_tokens_kept_per_head(server: Server, scripted: ScriptedEngine):
    client = server.client
    client.post(COMPLETIONS, json={"prompt": [5] * 100, "max_tokens": 1})
    plan = client.get("/plan").json()
    assert plan["layers"][0] == [
        {"head": replica.head, "device": replica.device, "share": replica.share}
        for replica in scripted.plan.layers[0]
    ]
    assert np.shape(plan["kept_tokens"]) == (scripted.model_config.num_layers, 3)
    assert 0 < np.max(plan["kept_tokens"]) <= 64
    found = client.get("/stats").json()
    assert (found["state"], found["pages_per_device"]) == ("ready", 1000)
    assert client.get("/stats", params={"since": "many"}).status_code == 400


def test_files_are_found_from_anywhere_and_fetch_nothing_from_elsewhere(client: httpx.Client):
    for name in ("", "page.css", "page.js", "charts.js", "favicon.svg"):
        response = client.get(f"/{name}")
        assert response.status_code == 200
        assert response.headers["Content-Security-Policy"] == "default-src 'self'"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if find_chromium() is None:
        pytest.skip("no Chromium is on this machine")
    with browsing(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def text(browser: Browser, selector: str) -> str:
    found = f"document.querySelector({selector!r})?.textContent ?? ''"
    return browser.evaluate(found)


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (360, True)])
def test_the_page_shows_what_runs(checkpoint: Path, browser: Browser, width: int, dark: bool):
    slow = ScriptedEngine(checkpoint, step_seconds=0.01)
    may_load = threading.Event()
    browser.complaints.clear()
    browser.addresses.clear()

    def load() -> ScriptedEngine:
        assert may_load.wait(PATIENCE_S)
        return slow

    with running(load, wait=False) as server:
        browser.open(f"{server.url}/", width=width, dark=dark)
        eventually(lambda: text(browser, "#state") == "loading")
        may_load.set()
        eventually(lambda: text(browser, "#model") == "scripted")
        assert "2 layers with 3 KV heads each on 2 devices" in text(browser, "#plan-note")
        assert "* marks replicas that serve only part of the rows" in text(browser, "#devices-note")
        cells = "[...document.querySelectorAll('#devices-map text.dark, #devices-map text.light')]"
        assert browser.evaluate(f"{cells}.map(t => t.textContent)") == ["0 2*", "1 2*"] * 2
        assert browser.evaluate("document.querySelectorAll('#heads-map .mark').length") == 2
        long = {"prompt": "x", "max_tokens": 400, "n": 6, "stream": True}
        with server.client.stream("POST", COMPLETIONS, json=long) as response:
            lines = response.iter_lines()  # which hangs up once it is forgotten
            next(lines)
            eventually(lambda: text(browser, "#running") == "4 of 4")
            assert text(browser, "#waiting") == "2"
            assert "8" in text(browser, "#pages .value")
            assert "75% of the fullest" in text(browser, "#pages-note")
            assert "12 prefixes hold 5.00 MiB of the KV cache" in text(browser, "#prefixes-note")
            assert "1.5 running requests begin with the same" in text(browser, "#prefixes-note")
            rows = "document.querySelectorAll('#prefixes-table tbody tr')"
            assert browser.evaluate(f"{rows}.length") == LISTED_PREFIXES
            assert browser.evaluate(f"{rows}[0].textContent") == "8,0001,6003.00 MiB12"
            eventually(lambda: text(browser, "#generation") not in ("–", "0"))
            assert browser.evaluate("document.querySelectorAll('#requests-chart polyline').length")
        eventually(lambda: text(browser, "#running") == "0 of 4")
        assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
        paper = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        assert paper == ("rgb(20, 24, 31)" if dark else "rgb(255, 255, 255)")
        assert all(address.startswith(server.url) for address in browser.addresses)
        assert browser.complaints == []
        server.client.post(COMPLETIONS, json={"prompt": CRASH})
        eventually(lambda: text(browser, "#state") == "failed")
    eventually(lambda: text(browser, "#state") == "unreachable")


def test_the_page_says_that_its_data_need_a_key(checkpoint: Path, browser: Browser):
    with running(lambda: ScriptedEngine(checkpoint), api_keys=("one",)) as server:
        browser.open(f"{server.url}/", width=1200, dark=False)
        eventually(lambda: "--open-metrics" in text(browser, "#about"))
