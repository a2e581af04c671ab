"""Clients share the engine: a flood of one does not starve the others."""

import re
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from fairkv_jax.engine.request import RequestOutput
from fairkv_jax.serve.middleware import client_name
from tests.serve.live import PATIENCE_S, Server, eventually, posted, running
from tests.serve.scripted import ScriptedEngine

COMPLETIONS = "/v1/completions"
KEYS = ("flood", "calm", "third")
BODY = {"prompt": "x", "max_tokens": 40}
LOOKAHEAD = 4
"""Requests that the engine is given before it has started them."""


def key(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {name}"}


class Gated(ScriptedEngine):
    """An engine that takes 0.2 seconds for `BODY`, one at a time, while its gate is open."""

    def __init__(self, checkpoint: Path):
        super().__init__(checkpoint, max_num_seqs=1, step_seconds=0.005)
        self.gate = threading.Event()

    def step(self) -> list[RequestOutput]:
        """Advances the first request only, since there is one row."""
        if not self.gate.wait(PATIENCE_S):
            return []
        waiting = dict(list(self.requests.items())[1:])
        for request_id in waiting:
            del self.requests[request_id]
        outputs = super().step()
        self.requests |= waiting
        return outputs


@pytest.fixture
def gated(checkpoint: Path) -> Iterator[Gated]:
    engine = Gated(checkpoint)
    yield engine
    engine.gate.set()


@pytest.fixture
def shared(gated: Gated) -> Iterator[Server]:
    """11 requests may run or wait."""
    with running(lambda: gated, api_keys=KEYS, max_num_queued_reqs=10) as server:
        yield server
        gated.gate.set()


class Clients:
    """Requests that have been sent, and whose answers have not been read yet."""

    def __init__(self, server: Server, stack: ExitStack):
        self._server, self._stack = server, stack

    def ask(self, name: str, count: int = 1, **options: Any) -> list[socket.socket]:
        """Sends requests; they wait or run when this returns."""
        expected = self._server.engine.num_requests + count * options.get("n", 1)
        asking = [
            self._stack.enter_context(
                posted(self._server.url, COMPLETIONS, {**BODY, **options}, key(name))
            )
            for _ in range(count)
        ]
        eventually(lambda: self._server.engine.num_requests == expected)
        return asking


def answer(connection: socket.socket) -> tuple[int, str]:
    """The status and the head of an answer, whose body has one part."""
    received = b""
    while b"}" not in received:
        received += connection.recv(1 << 16)
    return int(received.split(b" ", 2)[1]), received.decode()


def test_a_flood_does_not_starve_another_key(gated: Gated, shared: Server):
    """Another key's request waits only for the few of the flood that the engine has."""
    with ExitStack() as stack:
        clients = Clients(shared, stack)
        clients.ask("flood", 10)
        (calm,) = clients.ask("calm")
        gated.gate.set()
        assert answer(calm)[0] == 200
        assert shared.engine.num_requests >= 10 - LOOKAHEAD - 1, "the flood went first"


def test_the_choices_of_a_prompt_reach_the_engine_together(gated: Gated, shared: Server):
    """They share its prefill, also where they are more than the engine is given otherwise."""
    with ExitStack() as stack:
        clients = Clients(shared, stack)
        clients.ask("flood", n=LOOKAHEAD + 3)
        eventually(lambda: len(gated.requests) == LOOKAHEAD + 3)
        assert len({request.same_prompt for request in gated.requests.values()}) == 1
        clients.ask("flood", n=2)
        assert len(gated.requests) == LOOKAHEAD + 3


def test_a_full_queue_still_has_room_for_a_key_with_less_in_it(gated: Gated, shared: Server):
    with ExitStack() as stack:
        clients = Clients(shared, stack)
        flood = clients.ask("flood", 11)
        refused = shared.client.post(COMPLETIONS, json=BODY, headers=key("flood"))
        assert refused.status_code == 503
        calm = stack.enter_context(posted(shared.url, COMPLETIONS, BODY, key("calm")))
        status, text = answer(flood[-1])  # the newest one gives way
        assert status == 503
        assert "other clients have less in it" in text
        gated.gate.set()
        assert answer(calm)[0] == 200
        assert [answer(each)[0] for each in flood[:-1]] == [200] * 10


def test_nobody_gives_way_in_vain(gated: Gated, shared: Server):
    """If that would not make room for all choices of a request, it is refused."""
    with ExitStack() as stack:
        clients = Clients(shared, stack)
        flood = clients.ask("flood", 11)
        body = {**BODY, "n": 6}
        refused = shared.client.post(COMPLETIONS, json=body, headers=key("calm"))
        assert refused.status_code == 503
        assert shared.engine.num_requests == 11
        gated.gate.set()
        assert [answer(each)[0] for each in flood] == [200] * 11


def test_a_batch_whose_first_prompts_run_is_not_ended_for_one_more(gated: Gated, shared: Server):
    """It would lose what has been computed; the queue has room as soon as it goes on."""
    with ExitStack() as stack:
        clients = Clients(shared, stack)
        asked = stack.enter_context(
            posted(shared.url, COMPLETIONS, {**BODY, "prompt": ["x"] * 11}, key("flood"))
        )
        eventually(lambda: shared.engine.num_requests == 11)
        refused = shared.client.post(COMPLETIONS, json=BODY, headers=key("calm"))
        assert refused.status_code == 503
        gated.gate.set()
        eventually(lambda: shared.engine.num_requests < 11)
        (calm,) = clients.ask("calm")
        assert answer(calm)[0] == answer(asked)[0] == 200


def test_the_limit_of_a_key(gated: Gated):
    options = {"api_keys": KEYS, "max_num_queued_reqs_per_key": 3}
    with running(lambda: gated, **options) as server, ExitStack() as stack:
        clients = Clients(server, stack)
        clients.ask("flood", LOOKAHEAD)  # The engine has all of them.
        clients.ask("flood", 3)
        refused = server.client.post(COMPLETIONS, json=BODY, headers=key("flood"))
        assert refused.status_code == 429, "503 would make a router try the other replicas"
        assert int(refused.headers["Retry-After"]) >= 1
        assert "--max-num-queued-reqs-per-key" in refused.json()["error"]["message"]
        body = {**BODY, "n": 4}
        impossible = server.client.post(COMPLETIONS, json=body, headers=key("third"))
        assert impossible.status_code == 400, "trying again would not help"
        assert "--max-num-queued-reqs-per-key" in impossible.json()["error"]["message"]
        gated.gate.set()
        assert server.client.post(COMPLETIONS, json=BODY, headers=key("calm")).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_requests_that_wait_too_long_are_told_when_to_come_back(gated: Gated, stream: bool):
    """Also those that the engine has been given, but not the one that it may have started."""
    options = {"api_keys": KEYS, "max_queue_wait": 1}
    with running(lambda: gated, **options) as server, ExitStack() as stack:
        first, *others = Clients(server, stack).ask("flood", LOOKAHEAD + 1, stream=stream)
        began = time.monotonic()
        for each in others:
            status, text = answer(each)
            assert "--max-queue-wait" in text
            assert status == 503
            assert "retry-after: " in text
        assert 0.5 < time.monotonic() - began < 10
        assert server.engine.num_requests == 1
        gated.gate.set()
        assert answer(first)[0] == 200


def test_one_that_might_have_started_is_looked_at_again(
    gated: Gated, monkeypatch: pytest.MonkeyPatch
):
    with running(lambda: gated, max_queue_wait=1) as server, ExitStack() as stack:
        (asked,) = Clients(server, stack).ask("flood")
        time.sleep(1.5)
        assert server.engine.num_requests == 1
        monkeypatch.setattr(server.engine._admission, "may_have_started", lambda ids: False)
        assert answer(asked)[0] == 503
        gated.gate.set()


def test_a_client_that_hangs_up_before_its_stream_begins_waits_no_longer(
    gated: Gated, shared: Server
):
    with ExitStack() as stack:
        Clients(shared, stack).ask("flood", 3, stream=True)
    eventually(lambda: shared.engine.num_requests == 0)


def test_retry_after_is_the_expected_wait(gated: Gated, shared: Server):
    """None of those that wait has been given to the engine for 1.2 seconds."""
    with ExitStack() as stack:
        began = time.monotonic()
        clients = Clients(shared, stack)
        clients.ask("flood", 11)
        time.sleep(1.2)
        refused = shared.client.post(COMPLETIONS, json=BODY, headers=key("flood"))
        waited = time.monotonic() - began
        num_waiting = 11 - LOOKAHEAD
        assert refused.status_code == 503
        retry_after_s = int(refused.headers["Retry-After"])
        assert 1.2 * num_waiting <= retry_after_s <= waited * num_waiting + 1
        gated.gate.set()


MONITORING: Sequence[str] = ("/load", "/metrics", "/stats", "/plan", "/docs", "/openapi.json")


def test_what_tells_of_the_load_needs_a_key(shared: Server):
    for path in MONITORING:
        assert shared.client.get(path).status_code == 401
        assert shared.client.get(path, headers=key("calm")).status_code == 200
    for path in ("/health", "/live", "/ping", "/ready", "/version", "/"):
        assert shared.client.get(path).status_code == 200


def test_open_metrics(gated: Gated):
    with running(lambda: gated, api_keys=KEYS, open_metrics=True) as server:
        for path in MONITORING:
            assert server.client.get(path).status_code == 200
        assert server.client.post(COMPLETIONS, json=BODY).status_code == 401


def test_without_keys_everything_is_open(client: httpx.Client):
    for path in MONITORING:
        assert client.get(path).status_code == 200


@pytest.mark.parametrize(
    ("first", "second", "is_same"),
    [
        ("2001:db8:1:2::5", "2001:db8:1:2:ffff::9", True),
        ("2001:db8:1:2::5", "2001:db8:1:3::5", False),
        ("10.0.0.1", "10.0.0.2", False),
        ("::ffff:10.0.0.1", "::ffff:10.0.0.2", False),
    ],
)
def test_a_host_with_many_addresses_is_one_client(first: str, second: str, is_same: bool):
    """A host usually has a network of 64 bits to itself in IPv6."""
    names = [
        client_name({"type": "http", "headers": [], "client": (address, 1)}, has_keys=False)
        for address in (first, second)
    ]
    assert (names[0] == names[1]) == is_same


def test_an_unknown_model_is_repeated_in_part(shared: Server):
    body = {**BODY, "model": "m" * 100_000}
    response = shared.client.post(COMPLETIONS, json=body, headers=key("calm"))
    assert response.status_code == 404
    assert re.findall("m{9,}", response.text) == ["m" * 200]
