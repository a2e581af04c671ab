"""Many clients at a time, some of whom leave: nothing fails, nothing stays behind."""

import asyncio
import random
from collections import Counter
from pathlib import Path

import httpx

from tests.serve.live import PATIENCE_S, eventually, running
from tests.serve.scripted import ScriptedEngine

NUM_REQUESTS = 400
AT_A_TIME = 32


async def one_client(client: httpx.AsyncClient, chance: random.Random) -> str:
    """The status of one request, or "left" where the client did before its answer came."""
    body = {
        "prompt": [chance.randrange(3, 200) for _ in range(chance.randrange(1, 60))],
        "max_tokens": chance.randrange(1, 40),
        "n": chance.choice([1, 1, 3]),
        "stream": chance.random() < 0.5,
        "stop": chance.choice([None, "a", ["b", "cd"]]),
        "logprobs": chance.choice([None, 0, 2]),
    }
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
        assert set(statuses) == {"200", "left"}
        assert statuses["200"] > NUM_REQUESTS / 2
        eventually(lambda: server.engine.num_requests == 0 and not engine.requests)
        assert engine.aborted
        assert server.client.get("/health").status_code == 200
