"""Sends random requests to a server, cancels some of them, and checks for leaks."""

import asyncio
import time
from collections import Counter
from typing import Any

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.streams import headers, random_prompt, vocabulary

DRAIN_S = 10.0
MEMORY = "process_resident_memory_bytes"
COMPILED = "fairkv:compilations_after_ready_total"
USAGE = "vllm:kv_cache_usage_perc"


def body(chance: np.random.Generator, ids: range, longest: int, most_tokens: int) -> dict[str, Any]:
    """Returns the body of a random request; most fields are usually left out."""

    def some(probability: float, value: Any) -> Any:
        return value if chance.random() < probability else None

    stream = bool(chance.random() < 0.5)
    max_tokens = int(chance.integers(1, most_tokens, endpoint=True))
    length = int(chance.integers(1, max(2, longest - most_tokens)) ** chance.choice([0.5, 1.0]))
    fields = {
        "prompt": random_prompt(chance, ids, max(1, length)),
        "max_tokens": max_tokens,
        "min_tokens": some(0.2, int(chance.integers(0, max_tokens, endpoint=True))),
        "n": some(0.2, int(chance.integers(1, 4))),
        "stream": stream,
        "ignore_eos": some(0.5, True),
        "temperature": some(0.7, float(chance.uniform(0, 2))),
        "top_p": some(0.3, float(chance.uniform(0.1, 1))),
        "top_k": some(0.3, int(chance.integers(1, 100))),
        "min_p": some(0.2, float(chance.uniform(0, 0.5))),
        "seed": some(0.3, int(chance.integers(2**31))),
        "logprobs": some(0.3, int(chance.integers(0, 6))),
        "prompt_logprobs": None if stream else some(0.1, int(chance.integers(0, 6))),
        "echo": some(0.1, True),
        "stop": some(0.3, ["e", "the"]),
        "presence_penalty": some(0.2, float(chance.uniform(-2, 2))),
        "frequency_penalty": some(0.2, float(chance.uniform(-2, 2))),
        "repetition_penalty": some(0.2, float(chance.uniform(0.5, 2))),
        "logit_bias": some(0.2, {str(ids.start): 5.0}),
        "guided_regex": some(0.1, "[a-z ]{1,40}"),
    }
    return {name: value for name, value in fields.items() if value is not None}


async def one(client: httpx.AsyncClient, request: dict[str, Any], patience_s: float | None) -> str:
    """Sends a request and returns its status, or "cancelled" if `patience_s` elapsed first."""
    try:
        answer = await asyncio.wait_for(client.post("/v1/completions", json=request), patience_s)
    except TimeoutError:
        return "cancelled"
    failed = answer.status_code == 200 and 'data: {"error"' in answer.text
    return "error in the stream" if failed else str(answer.status_code)


async def gauges(client: httpx.AsyncClient) -> dict[str, float]:
    """Returns the metrics by name; for metrics with several labels, the last sample."""
    text = (await client.get("/metrics")).raise_for_status().text
    return {s.name: s.value for f in text_string_to_metric_families(text) for s in f.samples}


async def soak(url: str, api_key: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """Sends all requests and summarises their statuses and the server's metrics."""
    chance = np.random.default_rng(options["seed"])
    ids = vocabulary(url, api_key)
    requests = options["num_requests"]
    statuses: Counter[str] = Counter()
    async with httpx.AsyncClient(base_url=url, headers=headers(api_key), timeout=None) as client:
        models = (await client.get("/v1/models")).raise_for_status().json()
        longest = models["data"][0]["max_model_len"]
        at_once, seconds = 1, 0.1
        seen = [await gauges(client)]
        began = time.perf_counter()
        for half in (requests // 2, requests - requests // 2):
            left = half
            while left:
                at_once = min(left, int(chance.integers(1, options["max_concurrency"] + 1)))
                start = time.perf_counter()
                asking = [
                    one(
                        client,
                        body(chance, ids, longest, options["output_len"]),
                        chance.random() * seconds
                        if chance.random() < options["cancelled"]
                        else None,
                    )
                    for _ in range(at_once)
                ]
                statuses.update(await asyncio.gather(*asking))
                seconds = time.perf_counter() - start  # Upper limit of the next requests' patience.
                left -= at_once
            seen.append(await gauges(client))
        duration = time.perf_counter() - began
        while seen[-1][USAGE] > 0 and time.perf_counter() - began < duration + DRAIN_S:
            await asyncio.sleep(0.05)
            seen[-1] = await gauges(client)
    return {
        "statuses": dict(statuses),
        "duration_s": duration,
        "compilations": seen[-1][COMPILED] - seen[0][COMPILED],
        "kv_cache_usage_at_the_end": seen[-1][USAGE],
        "resident_bytes": [int(each[MEMORY]) for each in seen],
        "growth_in_the_second_half": seen[2][MEMORY] / seen[1][MEMORY] - 1,
    }


def is_sound(result: dict[str, Any]) -> bool:
    fine = {"200", "cancelled"}
    unharmed = set(result["statuses"]) <= fine and not result["compilations"]
    return unharmed and result["kv_cache_usage_at_the_end"] == 0
