"""Measures a running server under load: time to first token, inter-token latency, tokens/s.

    python -m benchmarks.serving --max-concurrency 8 --num-prompts 64             # closed loop
    python -m benchmarks.serving --request-rate 2 --num-prompts 100               # open loop
    python -m benchmarks.serving --stall --num-streams 4 --input-len 8000         # see below

A closed loop sends the next request when one has ended. An open loop sends requests as a Poisson
process with the given rate, whatever the server does. With `--stall`, a long prompt arrives while
streams are running, and the result compares their inter-token latencies before and during its
prefill.

Prompts are random tokens. Options have the same names as in `vllm bench serve`.
"""

import asyncio
import json
import logging
import math
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from absl import app, flags

from benchmarks.streams import Answer, headers, random_prompt, stream, summary_ms, vocabulary
from fairkv_jax.command_line import with_underscores

_URL = flags.DEFINE_string("base_url", "http://127.0.0.1:8000", "Address of the server.")
_KEY = flags.DEFINE_string("api_key", None, "API key of the server.")
_PROMPTS = flags.DEFINE_integer("num_prompts", 64, "Number of requests.", lower_bound=1)
_RATE = flags.DEFINE_float("request_rate", math.inf, "Requests per second; inf: all at once.")
_BURST = flags.DEFINE_float("burstiness", 1.0, "Burstiness of arrivals; 1: Poisson process.")
_AT_ONCE = flags.DEFINE_integer("max_concurrency", None, "Maximum concurrent requests.")
_INPUT = flags.DEFINE_integer("input_len", 256, "Tokens per prompt.", lower_bound=1)
_OUTPUT_LEN = flags.DEFINE_integer("output_len", 64, "Generated tokens.", lower_bound=1)
_RANGE = flags.DEFINE_float("range_ratio", 0.0, "Maximum relative deviation of lengths.", 0, 1)
_SEED = flags.DEFINE_integer("seed", 0, "Random seed of prompts, lengths and arrivals.")
_WARM = flags.DEFINE_integer("num_warmups", 1, "Requests that are sent before measuring.")
_STALL = flags.DEFINE_boolean("stall", False, "Measure how a long prompt delays streams.")
_STREAMS = flags.DEFINE_integer("num_streams", 4, "Streams that run while the long prompt arrives.")
_QUIET = flags.DEFINE_float(
    "quiet_seconds", 10.0, "Seconds that the streams run before the long prompt arrives."
)
_RESULT = flags.DEFINE_string("output", None, "Path of the results in JSON.")


def body(prompt: list[int], output_len: int) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": output_len, "ignore_eos": True, "temperature": 0}


def lengths(chance: np.random.Generator, mean: int) -> int:
    """Draws a length uniformly around the mean."""
    low, high = mean * (1 - _RANGE.value), mean * (1 + _RANGE.value)
    return max(1, int(chance.integers(math.floor(low), math.floor(high), endpoint=True)))


async def load(client: httpx.AsyncClient, ids: range) -> dict[str, Any]:
    """Sends all requests and summarises their latencies."""
    chance = np.random.default_rng(_SEED.value)
    requests = [
        (
            random_prompt(chance, ids, lengths(chance, _INPUT.value)),
            lengths(chance, _OUTPUT_LEN.value),
        )
        for _ in range(_PROMPTS.value)
    ]
    for prompt, output_len in requests[: _WARM.value]:
        await stream(client, Answer(len(prompt)), body(prompt, output_len))
    room = asyncio.Semaphore(_AT_ONCE.value or len(requests))

    async def one(prompt: list[int], output_len: int) -> Answer:
        async with room:
            return await stream(client, Answer(len(prompt)), body(prompt, output_len))

    tasks = []
    began = time.perf_counter()
    due = began
    for prompt, output_len in requests:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(one(prompt, output_len)))
        if math.isfinite(_RATE.value):
            # Gaps are gamma-distributed; with shape 1 they are exponential (a Poisson process).
            due += chance.gamma(_BURST.value, 1 / (_RATE.value * _BURST.value))
    answers = await asyncio.gather(*tasks)
    return figures(answers, time.perf_counter() - began)


def figures(answers: list[Answer], seconds: float) -> dict[str, Any]:
    done = [answer for answer in answers if answer.error is None]
    generated = sum(answer.output_tokens for answer in done)
    several = [answer for answer in done if answer.output_tokens > 1]
    per_token = [(a.latency - a.time_to_first_token) / (a.output_tokens - 1) for a in several]
    return {
        "completed": len(done),
        "failed": len(answers) - len(done),
        "errors": sorted({answer.error for answer in answers if answer.error})[:5],
        "duration_s": seconds,
        "request_throughput": len(done) / seconds,
        "output_throughput": generated / seconds,
        "total_token_throughput": (generated + sum(a.prompt_tokens for a in done)) / seconds,
        "ttft_ms": summary_ms([answer.time_to_first_token for answer in done]),
        "tpot_ms": summary_ms(per_token),
        "itl_ms": summary_ms([gap for answer in done for gap in answer.intervals()]),
        "e2el_ms": summary_ms([answer.latency for answer in done]),
    }


async def stall(client: httpx.AsyncClient, ids: range) -> dict[str, Any]:
    """Measures inter-token latencies of streams before and during a long prompt's prefill."""
    chance = np.random.default_rng(_SEED.value)
    models = (await client.get("/v1/models")).raise_for_status().json()
    room = models["data"][0]["max_model_len"]
    prompt = random_prompt(chance, ids, 32)
    answers = [Answer(len(prompt)) for _ in range(_STREAMS.value)]
    tasks = [
        asyncio.create_task(stream(client, answer, body(prompt, room - len(prompt))))
        for answer in answers
    ]
    while not all(answer.arrivals for answer in answers):
        await asyncio.sleep(0.05)
        if error := next((answer.error for answer in answers if answer.error), None):
            raise SystemExit(f"a stream failed: {error}")
    quiet_since = time.perf_counter()
    await asyncio.sleep(_QUIET.value)
    long = Answer(_INPUT.value)
    await stream(client, long, body(random_prompt(chance, ids, _INPUT.value), 1))
    if long.error:
        raise SystemExit(f"the long prompt failed: {long.error}")
    began, ended = long.sent, long.arrivals[0][0]
    await asyncio.sleep(_QUIET.value / 4)
    if any(task.done() for task in tasks):
        raise SystemExit("a stream ended too early: lower --quiet-seconds")
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    quiet = [gap for answer in answers for gap in answer.intervals(quiet_since, began)]
    busy = [gap for answer in answers for gap in answer.intervals(began, ended)]
    return {
        "streams": _STREAMS.value,
        "prompt_tokens": _INPUT.value,
        "prompt_ttft_s": ended - began,
        "quiet_itl_ms": summary_ms(quiet),
        "stalled_itl_ms": summary_ms(busy),
        "ratio_of_means": float(np.mean(busy) / np.mean(quiet)),
        "ratio_of_medians": float(np.median(busy) / np.median(quiet)),
    }


def print_table(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = ("mean", "p50", "p90", "p95", "p99", "max")
    table = Table("milliseconds", *columns)
    for name, values in results.items():
        if isinstance(values, dict) and "mean" in values:
            table.add_row(name.removesuffix("_ms"), *(f"{values[c]:,.1f}" for c in columns))
    console = Console(width=100)
    console.print(table)
    for name, value in results.items():
        if isinstance(value, int | float):
            console.print(
                f"{name:<24} {value:,.2f}" if isinstance(value, float) else f"{name:<24} {value}"
            )
        elif isinstance(value, list):
            for text in value:
                console.print(f"error: {text}")


async def measure() -> dict[str, Any]:
    url = _URL.value.rstrip("/").removesuffix("/v1")
    ids = vocabulary(url, _KEY.value)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=url, headers=headers(_KEY.value), timeout=None, limits=limits
    ) as client:
        return await (stall if _STALL.value else load)(client, ids)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    logging.getLogger("httpx").setLevel("WARNING")
    results = asyncio.run(measure())
    print_table(results)
    if _RESULT.value:
        options = {f.name: f.value for f in flags.FLAGS.get_key_flags_for_module(sys.argv[0])}
        options.pop("api_key")
        text = json.dumps({"flags": options, **results}, indent=2)
        Path(_RESULT.value).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    app.run(main, argv=[with_underscores(argument) for argument in sys.argv])
