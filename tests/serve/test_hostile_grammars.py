"""Schemas of a few bytes that take minutes and gigabytes to compile: others are served meanwhile.

The engine is scripted; the grammars are compiled as they are for the real one.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from fairkv_jax.bounded_worker import memory_in_use
from fairkv_jax.config import GrammarLimits
from tests.serve.live import PATIENCE_S, Server, eventually, posted, running
from tests.serve.scripted import ScriptedEngine

COMPLETIONS = "/v1/completions"
TIMEOUT_S = 1.0
HONEST, HOSTILE = ({"Authorization": f"Bearer {key}"} for key in ("honest", "hostile"))


def hostile(number: int) -> dict[str, object]:
    schema = {"type": "integer", "multipleOf": 10_000_011 + 10 * number}
    return {"prompt": "x", "max_tokens": 2, "guided_json": schema}


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> ScriptedEngine:
    return ScriptedEngine(checkpoint, grammar_limits=GrammarLimits(timeout_s=TIMEOUT_S))


@pytest.fixture(scope="module")
def guarded(engine: ScriptedEngine) -> Iterator[Server]:
    with running(lambda: engine, api_keys=("honest", "hostile")) as server:
        server.engine.engine.start_workers()
        yield server


def test_others_are_served_while_hostile_schemas_compile(guarded: Server):
    statuses: list[tuple[int, str]] = []

    def attack(number: int) -> None:
        body = hostile(number)
        with httpx.Client(base_url=guarded.url, timeout=PATIENCE_S, headers=HOSTILE) as client:
            response = client.post(COMPLETIONS, json=body)
        statuses.append((response.status_code, response.json()["error"]["message"]))

    before = memory_in_use()[1]
    attackers = [threading.Thread(target=attack, args=(number,)) for number in range(5)]
    for attacker in attackers:
        attacker.start()
    began = time.monotonic()
    number, longest = 0, 0.0
    while any(attacker.is_alive() for attacker in attackers):
        number += 1
        schema = {"type": "integer", "maximum": number}
        for extra in ({}, {"guided_json": schema}):
            asked = time.monotonic()
            body = {"prompt": "x", "max_tokens": 2, **extra}
            response = guarded.client.post(COMPLETIONS, json=body, headers=HONEST)
            if not extra:
                longest = max(longest, time.monotonic() - asked)
            assert response.status_code == 200, response.text
        assert guarded.client.get("/health").status_code == 200
    duration = time.monotonic() - began
    assert number > 10, "honest requests waited for the hostile ones"
    assert longest < duration / 2, "a plain request waited for hostile ones"
    assert memory_in_use()[1] - before < 200 << 20
    assert {status for status, _ in statuses} == {400}
    assert all("1 seconds" in text and "grammar_timeout" in text for _, text in statuses)


def test_a_schema_that_was_refused_is_refused_at_once(guarded: Server):
    for _ in range(2):
        began = time.monotonic()
        response = guarded.client.post(COMPLETIONS, json=hostile(100), headers=HOSTILE)
        assert response.status_code == 400
    assert time.monotonic() - began < 1


def test_compiling_ends_when_the_clients_have_gone(guarded: Server):
    """Seven requests would occupy a worker for seven times the limit."""
    with ExitStack() as connections:
        for number in range(200, 207):
            body = {**hostile(number)}
            connections.enter_context(posted(guarded.url, COMPLETIONS, body, HOSTILE))
        time.sleep(0.3)
    began = time.monotonic()
    body = {"prompt": "x", "max_tokens": 2, "guided_json": {"type": "integer", "maximum": 7777}}
    response = guarded.client.post(COMPLETIONS, json=body, headers=HOSTILE)
    assert response.status_code == 200, response.text
    assert time.monotonic() - began < TIMEOUT_S + 2


def test_a_schema_that_takes_too_much_memory(checkpoint: Path):
    limits = GrammarLimits(timeout_s=60.0, memory_bytes=16 << 20)
    with running(lambda: ScriptedEngine(checkpoint, grammar_limits=limits)) as server:
        response = server.client.post(COMPLETIONS, json=hostile(0))
    assert response.status_code == 400
    assert "more than 16 MiB of memory" in response.json()["error"]["message"]
    assert response.json()["error"]["param"] == "guided_json"


def test_health_fails_while_requests_make_no_progress(checkpoint: Path):
    class Stuck(ScriptedEngine):
        def step(self):
            assert released.wait(PATIENCE_S)
            return super().step()

    released = threading.Event()
    with running(lambda: Stuck(checkpoint), stall_timeout=1) as server:
        assert server.client.get("/health").status_code == 200
        with posted(server.url, COMPLETIONS, {"prompt": "x", "max_tokens": 2}) as connection:
            eventually(lambda: server.client.get("/health").status_code == 503, patience_s=5)
            error = server.client.get("/health").json()["error"]
            assert "--stall-timeout" in error["message"]
            released.set()
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        eventually(lambda: server.client.get("/health").status_code == 200)
