"""The OpenAPI description: it is complete, and whatever is made from it is answered well."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import httpx
import pytest

from fairkv_jax.serve.protocol import MAX_CHOICES, MAX_STOPS, ChatBody, CompletionBody
from fairkv_jax.serve.unsupported import WITHOUT_EFFECT
from tests.serve.chromium import browsing, find_chromium
from tests.serve.live import ROOT, Server, eventually, running
from tests.serve.scripted import ScriptedEngine

CASES, MANY_CASES = 4, int(os.environ.get("OPENAPI_CASES", "1000"))
"""Drawn for each of the operations, beside those at the limits of every field."""
EXCEPTIONS = Path(__file__).with_name("schemathesis.toml")
"""The checks that are not made, with the reasons."""


def test_every_operation_describes_what_it_takes_and_its_errors(client: httpx.Client):
    description = client.get("/openapi.json").json()
    operations = [
        (path, method, operation)
        for path, methods in description["paths"].items()
        for method, operation in methods.items()
    ]
    assert {path for path, method, _ in operations if method == "post"} == {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/prefixes",
        "/tokenize",
        "/detokenize",
        "/ping",
    }
    for path, method, operation in operations:
        if path != "/metrics":  # which is text
            assert "$ref" in operation["responses"]["4XX"]["content"]["application/json"]["schema"]
        assert "422" not in operation["responses"]  # FastAPI's own, in another shape
        if method == "post" and path != "/ping":
            assert "$ref" in operation["requestBody"]["content"]["application/json"]["schema"]
        kinds = {"application/json"}
        if path == "/metrics":
            kinds = {"text/plain"}
        elif path.endswith("/completions"):
            kinds.add("text/event-stream")
        if "200" in operation["responses"]:
            assert set(operation["responses"]["200"]["content"]) == kinds, path


def test_fields_that_are_refused_are_not_described(client: httpx.Client):
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    for name, body in (("ChatBody", ChatBody), ("CompletionBody", CompletionBody)):
        assert not set(schemas[name]["properties"]) & {*body.REFUSED, *WITHOUT_EFFECT}
    prompt = schemas["CompletionBody"]["properties"]["prompt"]["anyOf"]
    assert [each.get("minLength", each.get("minItems")) for each in prompt] == [1, 1, 1, 1]
    stop = schemas["CompletionBody"]["properties"]["stop"]["anyOf"]
    assert stop[1]["maxItems"] == MAX_STOPS
    choices = schemas["ChatBody"]["properties"]["n"]["anyOf"][0]
    assert (choices["minimum"], choices["maximum"]) == (1, MAX_CHOICES)
    described = schemas["CompletionBody"]["properties"]["prompt"]["description"]
    assert "--max-num-queued-reqs" in described


def test_the_page_of_the_description_loads_nothing_from_elsewhere(client: httpx.Client):
    page = client.get("/docs")
    assert page.headers["content-security-policy"] == "default-src 'self'"
    loaded = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert {"docs.js", "docs.css", "openapi.json"} <= set(loaded)
    for name in loaded:
        assert "//" not in name
        assert client.get(f"/{name}").status_code == 200


@pytest.mark.skipif(find_chromium() is None, reason="there is no Chromium to show the page")
def test_the_page_shows_every_operation(server: Server, tmp_path: Path):
    with browsing(tmp_path) as browser:
        browser.open(f"{server.url}/docs")
        count = "document.querySelectorAll('#operations h2').length"
        eventually(lambda: browser.evaluate(count))
        paths = server.client.get("/openapi.json").json()["paths"]
        assert browser.evaluate(count) == sum(map(len, paths.values()))
        text = browser.evaluate("document.body.innerText")
        assert "POST /v1/chat/completions" in text
        assert "max_completion_tokens" in text
        assert not browser.complaints
        assert all(address.startswith(server.url) for address in browser.addresses)


@pytest.mark.parametrize("cases", [CASES, pytest.param(MANY_CASES, marks=pytest.mark.long)])
def test_what_is_drawn_from_the_description_breaks_nothing(
    checkpoint: Path, tmp_path: Path, cases: int
):
    """Valid and invalid data, other methods, missing fields; all checks but those in the file."""
    quick = ScriptedEngine(checkpoint, step_seconds=0.0)
    with running(lambda: quick) as server:
        fuzz(server.url, tmp_path, cases)
        assert server.client.get("/health").status_code == 200
        eventually(lambda: not quick.requests)


def fuzz(url: str, folder: Path, cases: int) -> None:
    checks = tomllib.loads(EXCEPTIONS.read_text(encoding="utf-8"))["checks"]
    without = ",".join(name for name, check in checks.items() if not check["enabled"])
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json"]
    command += ["--checks=all", f"--exclude-checks={without}", "--generation-database=none"]
    command += ["--phases=examples,coverage,fuzzing,stateful", f"--max-examples={cases}"]
    command += ["--seed=1", "--no-color"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300 + 5 * cases,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "Fuzzing" in done.stdout
