"""Many requests of every kind on a running server, some of which are given up: what stays behind?

    python -m benchmarks.soak --num-requests 2000 --cancelled 0.2

Lengths, parameters and the number of requests at a time are random. The exit status is 1 if one was
answered 5xx, if something was compiled, or if pages are still taken when all have ended.
"""

import asyncio
import json
import logging
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from absl import app, flags
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.streams import headers, random_prompt, vocabulary
from fairkv_jax.command_line import with_underscores

_URL = flags.DEFINE_string("base_url", "http://127.0.0.1:8000", "Address of the server.")
_KEY = flags.DEFINE_string("api_key", None, "Key, if the server asks for one.")
_REQUESTS = flags.DEFINE_integer("num_requests", 2000, "Requests in all.", lower_bound=2)
_CANCELLED = flags.DEFINE_float("cancelled", 0.2, "Part of them that is given up.", 0, 1)
_AT_ONCE = flags.DEFINE_integer("max_concurrency", 16, "Most requests at a time.", lower_bound=1)
_OUTPUT_LEN = flags.DEFINE_integer("output_len", 16, "Most generated tokens.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of all that is random.")
_RESULT = flags.DEFINE_string("output", None, "Where to write the JSON.")

DRAIN_S = 10.0
MEMORY = "process_resident_memory_bytes"
COMPILED = "fairkv:compilations_after_ready_total"
USAGE = "vllm:kv_cache_usage_perc"


def body(chance: np.random.Generator, ids: range, longest: int, most_tokens: int) -> dict[str, Any]:
    """A request with whatever may be asked for; most fields are left out most of the time."""

    def some(part: float, value: Any) -> Any:
        return value if chance.random() < part else None

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
    """The status of a request, or "cancelled" where the patience was at an end before it was."""
    try:
        answer = await asyncio.wait_for(client.post("/v1/completions", json=request), patience_s)
    except TimeoutError:
        return "cancelled"
    failed = answer.status_code == 200 and 'data: {"error"' in answer.text
    return "error in the stream" if failed else str(answer.status_code)


async def gauges(client: httpx.AsyncClient) -> dict[str, float]:
    """What /metrics says, by name; of what has further labels, the last."""
    text = (await client.get("/metrics")).raise_for_status().text
    return {s.name: s.value for f in text_string_to_metric_families(text) for s in f.samples}


async def soak(url: str, api_key: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """All requests, and what the server says of itself in the middle and at the end."""
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
                seconds = time.perf_counter() - start  # what the next ones' patience is drawn from
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


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    logging.getLogger("httpx").setLevel("WARNING")
    names = ("num_requests", "cancelled", "max_concurrency", "output_len", "seed")
    options = {name: flags.FLAGS[name].value for name in names}
    result = asyncio.run(soak(_URL.value.rstrip("/"), _KEY.value, options))
    text = json.dumps({"options": options, **result}, indent=2)
    print(text)
    if _RESULT.value:
        Path(_RESULT.value).write_text(text + "\n", encoding="utf-8")
    return 0 if is_sound(result) else 1


if __name__ == "__main__":
    app.run(main, argv=[with_underscores(argument) for argument in sys.argv])
