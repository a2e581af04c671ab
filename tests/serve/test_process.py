"""The process: signals, exit statuses and what it logs, with a scripted engine."""

import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.serve.live import PATIENCE_S, ROOT, Process, eventually
from tests.serve.scripted import CRASH, NO_MEMORY

LONG = {"prompt": "a private text", "max_tokens": 100}
SCRIPTED = "tests.serve.scripted_server"


@pytest.fixture
def process(checkpoint: Path) -> Iterator[Process]:
    """A server that takes 1 second for `LONG`."""
    with Process(SCRIPTED, [str(checkpoint), "0.01"]) as process:
        yield process


class Asking(threading.Thread):
    """A client with one request."""

    def __init__(self, url: str, body: dict[str, object]):
        super().__init__()
        self._url, self._body = url, body
        self.response: httpx.Response | None = None
        self.failed = False
        self.start()

    def run(self) -> None:
        try:
            self.response = httpx.post(
                f"{self._url}/v1/completions", json=self._body, timeout=PATIENCE_S
            )
        except httpx.TransportError:
            self.failed = True


def busy(url: str) -> str:
    """The gauge of running requests where it is not 0."""
    lines = httpx.get(f"{url}/metrics", timeout=PATIENCE_S).text.splitlines()
    return "".join(line for line in lines if "num_requests_running{" in line and " 0" not in line)


def reachable(url: str) -> bool:
    host, port = url.removeprefix("http://").split(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_running_requests_finish(process: Process, number: signal.Signals):
    url = process.wait_ready(PATIENCE_S)
    asking = Asking(url, {**LONG, "max_tokens": 300})
    eventually(lambda: "num_requests_running" in busy(url))
    process.send(number)
    with httpx.Client(base_url=url, timeout=PATIENCE_S) as client:
        eventually(lambda: client.get("/ready").status_code == 503, patience_s=5)
        refused = client.post("/v1/completions", json=LONG)
        assert refused.status_code == 503
        assert "shutting down" in refused.json()["error"]["message"]
        assert client.get("/health").status_code == 503
        assert client.get("/live").json() == {"status": "draining"}
    assert process.status() == 0
    asking.join(PATIENCE_S)
    assert asking.response is not None
    assert asking.response.json()["usage"]["completion_tokens"] == 300


def test_what_takes_longer_than_the_time_out_is_cut(process: Process):
    url = process.wait_ready(PATIENCE_S)
    asking = Asking(url, {**LONG, "max_tokens": 490, "n": 32})
    eventually(lambda: "num_requests_running" in busy(url))
    began = time.monotonic()
    process.send(signal.SIGTERM)
    assert process.status() == 0
    assert 4 < time.monotonic() - began < 30
    asking.join(PATIENCE_S)
    assert asking.response is not None
    assert asking.response.status_code == 503
    assert "shutting down" in asking.response.json()["error"]["message"]
    assert "Traceback" not in process.log


def test_a_second_signal_aborts(process: Process):
    url = process.wait_ready(PATIENCE_S)
    asking = Asking(url, LONG)
    eventually(lambda: "num_requests_running" in busy(url))
    process.send(signal.SIGTERM)
    time.sleep(0.2)
    process.send(signal.SIGTERM)
    assert process.status() == 130
    asking.join(PATIENCE_S)
    assert asking.failed


def test_a_signal_while_loading_ends_it(checkpoint: Path):
    with Process(SCRIPTED, [str(checkpoint), "loading"]) as process:
        url = process.address()
        eventually(lambda: reachable(url))
        assert httpx.get(f"{url}/live", timeout=PATIENCE_S).status_code == 200
        assert httpx.get(f"{url}/ready", timeout=PATIENCE_S).status_code == 503
        process.send(signal.SIGTERM)
        assert process.status() == 0


def test_a_failing_step_ends_the_process_after_everybody_knows(process: Process):
    url = process.wait_ready(PATIENCE_S)
    with httpx.Client(base_url=url, timeout=PATIENCE_S) as client:
        assert client.post("/v1/completions", json={"prompt": CRASH}).status_code == 503
        assert client.get("/health").status_code == 503
    assert process.status() == 1
    assert "the device is on fire" in process.log


def test_a_checkpoint_that_is_missing_is_a_sentence(tmp_path: Path):
    with Process(SCRIPTED, [str(tmp_path / "nowhere.gguf"), "0.01"]) as process:
        assert process.status() == 1
        assert "nowhere.gguf" in process.log
        assert "Traceback" not in process.log


def test_a_limit_of_memory_is_a_sentence(checkpoint: Path):
    with Process(SCRIPTED, [str(checkpoint), "out of memory"]) as process:
        assert process.status() == 1
        assert "the engine could not be loaded: the process may not take more memory" in process.log
        assert "Traceback" not in process.log


def test_a_limit_of_memory_that_a_step_reaches_is_a_sentence_too(process: Process):
    url = process.wait_ready(PATIENCE_S)
    body = {"prompt": NO_MEMORY}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE_S)
    assert answer.status_code == 503
    assert process.status() == 1
    assert "the engine failed: the process may not take more memory" in process.log


def test_a_signal_of_the_memory_is_not_silent(checkpoint: Path):
    """It comes when a file of weights is cut short while it is read."""
    arguments = [f"--model={checkpoint}", "--port=0"]
    with Process("fairkv_jax.serve", arguments) as process:
        process.address()
        process.send(signal.SIGBUS)
        assert process.status() == -signal.SIGBUS
    assert "Fatal Python error: Bus error" in process.log


def test_a_port_that_is_taken_is_a_sentence():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with Process("fairkv_jax.serve", ["--port", port]) as process:
            assert process.status() == 1
    assert f"cannot listen on 127.0.0.1:{port}" in process.log
    assert "--port" in process.log
    assert "Traceback" not in process.log


def test_the_log_says_what_runs_and_quotes_no_prompt(process: Process):
    url = process.wait_ready(PATIENCE_S)
    assert httpx.post(f"{url}/v1/completions", json=LONG, timeout=PATIENCE_S).status_code == 200
    process.send(signal.SIGTERM)
    assert process.status() == 0
    assert "model scripted: llama, 2 layers, 6 query heads, 3 KV heads" in process.log
    assert "head plan fair_copying: 3 KV heads on 2 devices, utilization 100.0%" in process.log
    assert "0-1     0 2 (50%)  1 2 (50%)" in process.log
    assert "60,000 tokens in all layers and heads" in process.log
    assert "117.2 uncompressed requests of maximum length" in process.log
    assert '"method": "POST", "path": "/v1/completions", "status": 200' in process.log
    assert "private" not in process.log
    assert str(ROOT) not in process.log
