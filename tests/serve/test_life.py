"""The server's life: loading, ready, overloaded, abandoned by clients, failed."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from fairkv_jax.serve.async_engine import State
from tests.serve.live import Server, eventually, posted, running
from tests.serve.scripted import CRASH, ScriptedEngine

COMPLETIONS = "/v1/completions"
LONG = {"prompt": "x", "max_tokens": 400}


@pytest.fixture
def slow(checkpoint: Path) -> ScriptedEngine:
    """An engine that takes 4 seconds for `LONG`."""
    return ScriptedEngine(checkpoint, max_num_seqs=2, step_seconds=0.01)


@pytest.fixture
def slow_server(slow: ScriptedEngine) -> Iterator[Server]:
    with running(lambda: slow, max_num_queued_reqs=1) as server:
        yield server


def test_it_lives_while_it_loads_and_is_not_ready(slow: ScriptedEngine):
    may_load = threading.Event()

    def load() -> ScriptedEngine:
        assert may_load.wait(60)
        return slow

    with running(load, wait=False) as server:
        assert server.client.get("/live").json() == {"status": "loading"}
        for path in ("/health", "/ping", "/ready", "/v1/models", "/tokenizer_info"):
            response = server.client.get(path)
            assert response.status_code == 503
            assert response.headers["Retry-After"]
            assert "loading" in response.json()["error"]["message"]
        assert server.client.post("/ping").status_code == 503
        assert server.client.post(COMPLETIONS, json=LONG).status_code == 503
        may_load.set()
        eventually(lambda: server.client.get("/ready").status_code == 200)
        for path in ("/health", "/live", "/ping", "/ready"):
            assert server.client.get(path).json() == {"status": "ready"}
        assert server.client.post("/ping").json() == {"status": "ready"}
        assert server.client.get("/v1/models").status_code == 200


def test_a_checkpoint_that_cannot_be_loaded(capsys: pytest.CaptureFixture[str]):
    def load() -> ScriptedEngine:
        raise ValueError("no checkpoint at nowhere.gguf")

    with running(load, wait=False) as server:
        eventually(lambda: server.engine.state is State.FAILED)
        assert server.client.get("/health").status_code == 503
        assert server.client.get("/live").json() == {"status": "failed"}
        assert server.client.post(COMPLETIONS, json=LONG).status_code == 503


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [COMPLETIONS, "/v1/chat/completions"])
def test_a_client_that_hangs_up_is_aborted(
    slow: ScriptedEngine, slow_server: Server, path: str, stream: bool
):
    body = {**LONG, "stream": stream, "messages": [{"role": "user", "content": "x"}]}
    with posted(slow_server.url, path, body) as connection:
        eventually(lambda: slow.requests)
        if stream:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
    eventually(lambda: not slow.requests, patience_s=5)
    assert len(slow.aborted) == 1
    assert slow_server.engine.num_requests == 0


def test_all_choices_of_an_abandoned_stream_are_aborted(slow: ScriptedEngine, slow_server: Server):
    body = {**LONG, "n": 3, "stream": True}
    with slow_server.client.stream("POST", COMPLETIONS, json=body) as response:
        assert next(response.iter_lines()).startswith("data: ")
    eventually(lambda: len(slow.aborted) == 3, patience_s=5)


def test_more_than_may_wait_are_told_to_try_again(slow: ScriptedEngine, slow_server: Server):
    never = slow_server.client.post(COMPLETIONS, json={**LONG, "n": 4})
    assert never.status_code == 400  # waiting would not help
    assert "at most 3 can be running or waiting" in never.json()["error"]["message"]
    with slow_server.client.stream("POST", COMPLETIONS, json={**LONG, "n": 3, "stream": True}):
        eventually(lambda: len(slow.requests) == 3)
        response = slow_server.client.post(COMPLETIONS, json=LONG)
        assert response.status_code == 503
        assert response.headers["Retry-After"]
        assert "--max-num-queued-reqs" in response.json()["error"]["message"]
        assert response.elapsed.total_seconds() < 2
    eventually(lambda: not slow.requests)
    short = {"prompt": "x", "max_tokens": 1}
    assert slow_server.client.post(COMPLETIONS, json=short).status_code == 200


def test_a_failing_step_reaches_every_client(slow: ScriptedEngine, slow_server: Server):
    results: dict[str, httpx.Response] = {}

    def ask() -> None:
        results["whole"] = httpx.post(slow_server.url + COMPLETIONS, json=LONG, timeout=60)

    waiting = threading.Thread(target=ask)
    waiting.start()
    with slow_server.client.stream("POST", COMPLETIONS, json={**LONG, "stream": True}) as response:
        lines = response.iter_lines()
        assert "error" not in json.loads(next(lines).removeprefix("data: "))
        eventually(lambda: len(slow.requests) == 2)
        slow.engine_config = type(slow.engine_config)(max_model_len=512, max_num_seqs=3)
        crash = httpx.post(slow_server.url + COMPLETIONS, json={"prompt": CRASH}, timeout=60)
        rest = [line.removeprefix("data: ") for line in lines if line]
    waiting.join(60)
    assert crash.status_code == results["whole"].status_code == 503
    for error in (crash.json(), results["whole"].json(), json.loads(rest[-2])):
        assert "the engine has failed" in error["error"]["message"]
        assert "fire" not in error["error"]["message"]
    assert slow_server.client.get("/health").status_code == 503
    assert slow_server.client.post(COMPLETIONS, json=LONG).status_code == 503
    assert slow.is_closed


def test_a_stopping_server_tells_who_still_waits(slow: ScriptedEngine):
    with running(lambda: slow) as server:
        with server.client.stream("POST", COMPLETIONS, json={**LONG, "stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            server.engine.stop()
            rest = [line for line in lines if line]
        assert "shutting down" in rest[-2]
        assert server.client.get("/health").status_code == 503
        eventually(lambda: slow.is_closed)


def test_slow_readers_are_given_what_has_come_together(checkpoint: Path):
    """A stream holds one output, the latest; nothing piles up while nobody reads."""
    quick = ScriptedEngine(checkpoint, step_seconds=0.0)
    with running(lambda: quick) as server:
        body = {"prompt": "x", "max_tokens": 400}
        whole = server.client.post(COMPLETIONS, json=body).json()["choices"][0]["text"]
        with server.client.stream("POST", COMPLETIONS, json={**body, "stream": True}) as response:
            eventually(lambda: not quick.requests)
            lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
        assert "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1]) == whole
