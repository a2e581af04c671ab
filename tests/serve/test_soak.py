"""Many clients at a time, some of whom leave: nothing fails, nothing stays behind."""

import asyncio
import random
from collections import Counter
from pathlib import Path
from threading import Event

import httpx
import pytest

from tests.serve.live import PATIENCE_S, eventually, running
from tests.serve.scripted import ScriptedEngine

NUM_REQUESTS = 400
AT_A_TIME = 32


async def one_client(client: httpx.AsyncClient, chance: random.Random) -> str:
    """The status of one request, or when the client left: before its answer, or in the middle."""
    body = {
        "prompt": [chance.randrange(3, 200) for _ in range(chance.randrange(1, 60))],
        "max_tokens": chance.randrange(1, 40),
        "n": chance.choice([1, 1, 3]),
        "stream": chance.random() < 0.5,
        "stop": chance.choice([None, "a", ["b", "cd"]]),
        "logprobs": chance.choice([None, 0, 2]),
    }
    if chance.random() < 0.1:
        body |= {"stream": True, "max_tokens": 400, "stop": None}
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            async for _ in answer.aiter_lines():
                return "left in the middle"
    patience = chance.random() * 0.05 if chance.random() < 0.2 else PATIENCE_S
    try:
        answer = await asyncio.wait_for(client.post("/v1/completions", json=body), patience)
    except TimeoutError:
        return "left"
    assert not body["stream"] or answer.text.endswith("data: [DONE]\n\n")
    assert '"error"' not in answer.text
    return str(answer.status_code)


async def all_clients(url: str) -> Counter[str]:
    chance = random.Random(0)
    room = asyncio.Semaphore(AT_A_TIME)

    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S) as client:

        async def next_client() -> str:
            async with room:
                return await one_client(client, chance)

        return Counter(await asyncio.gather(*(next_client() for _ in range(NUM_REQUESTS))))


def test_many_clients_of_whom_some_leave(checkpoint: Path):
    engine = ScriptedEngine(checkpoint, max_num_seqs=16, step_seconds=0.0005)
    with running(lambda: engine) as server:
        statuses = asyncio.run(all_clients(server.url))
        assert set(statuses) == {"200", "left", "left in the middle"}
        assert statuses["200"] > NUM_REQUESTS / 2
        eventually(lambda: server.engine.num_requests == 0 and not engine.requests)
        assert len(engine.aborted) >= statuses["left in the middle"]
        assert server.client.get("/health").status_code == 200


async def overloaded(url: str, clients: int, refusals: int, go_on: Event) -> list[httpx.Response]:
    """The answers to that many clients at once; `go_on` is set when so many have been refused."""
    body = {"prompt": "x", "max_tokens": 30}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, limits=limits) as client:
        asking = [client.post("/v1/completions", json=body) for _ in range(clients)]
        answers = []
        for answer in asyncio.as_completed(asking):
            answers.append(await answer)
            if sum(each.status_code == 503 for each in answers) == refusals:
                go_on.set()
    return answers


def test_ten_times_what_may_wait_is_told_to_come_again(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    """At once: nobody has been given a token until all of them have been refused."""
    engine = ScriptedEngine(checkpoint, max_num_seqs=4)
    step, go_on = engine.step, Event()
    monkeypatch.setattr(engine, "step", lambda: go_on.wait(PATIENCE_S) and step())
    with running(lambda: engine, max_num_queued_reqs=8) as server:
        answers = asyncio.run(overloaded(server.url, 120, 108, go_on))
        served = [a for a in answers if a.status_code == 200]
        refused = [a for a in answers if a.status_code == 503]
        assert (len(served), len(refused)) == (12, 108)
        assert all(len(a.json()["choices"][0]["text"]) == 30 for a in served)
        assert all(int(a.headers["Retry-After"]) >= 1 for a in refused)
        assert server.client.post("/v1/completions", json={"prompt": "x"}).status_code == 200


async def with_slow_ones(url: str) -> tuple[list[str], list[bytes]]:
    """What quick clients got beside a hundred slow ones, and what these got in the end."""
    host, port = url.removeprefix("http://").split(":")
    body = b'{"prompt": "x", "max_tokens": 40, "stream": true}'
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    done = asyncio.Event()

    async def slow(is_sender: bool) -> bytes:
        """Sends half and then waits; or sends all and does not read."""
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(head.encode() + (body[:20] if is_sender else body))
        await done.wait()
        writer.write(body[20:] if is_sender else b"")
        answer = await reader.read()
        writer.close()
        return answer

    waiting = [asyncio.create_task(slow(i % 2 == 0)) for i in range(100)]
    await asyncio.sleep(0.1)
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S) as client:
        quick = [client.post("/v1/completions", json={"prompt": "x"}) for _ in range(10)]
        texts = [answer.json()["choices"][0]["text"] for answer in await asyncio.gather(*quick)]
    done.set()
    return texts, await asyncio.gather(*waiting)


def test_a_hundred_slow_clients_harm_nobody(checkpoint: Path):
    engine = ScriptedEngine(checkpoint, max_num_seqs=16)
    with running(lambda: engine) as server:
        texts, answers = asyncio.run(with_slow_ones(server.url))
        assert len(set(texts)) == 1
        assert len(texts[0]) == 16
        assert all(b" 200 OK" in answer and b"[DONE]" in answer for answer in answers)
        eventually(lambda: not engine.requests)
