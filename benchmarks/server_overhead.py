"""Compares the tokens/s of the server with those of an `LLM` with the same options.

    python -m benchmarks.server_overhead --num-streams 8

The server process and the `LLM` in this process alternate in running the same prompts, so that one
is idle while the other runs. The medians over the rounds are compared.
"""

import asyncio
import json
import logging
import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
from absl import app, flags

from benchmarks.server_process import server_process
from benchmarks.streams import Answer, random_prompt, stream, vocabulary
from fairkv_jax.command_line import engine_flag, with_underscores

_MODEL = engine_flag("model")
_DEVICES = flags.DEFINE_integer("devices", 2, "Number of devices that share the model.")
_STREAMS = flags.DEFINE_integer(
    "num_streams", 8, "Concurrent requests, and rows of the decode batch."
)
_INPUT = flags.DEFINE_integer("input_len", 128, "Tokens per prompt.")
_OUTPUT_LEN = flags.DEFINE_integer("output_len", 128, "Generated tokens per request.")
_BUDGET = engine_flag("kv_budget", default=1024)
_CONTEXT = engine_flag("max_model_len", default=1024)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Number of rounds; the medians are compared.")
_RESULT = flags.DEFINE_string("output", None, "Path to which the printed JSON is also written.")


def options() -> dict[str, Any]:
    """Returns the engine options of the server and of the `LLM`."""
    from fairkv_jax.checkpoint.fetch import DEMO_MODEL

    return {
        "model": _MODEL.value or DEMO_MODEL,
        "tensor_parallel_size": _DEVICES.value,
        "max_num_seqs": _STREAMS.value,
        "max_model_len": _CONTEXT.value,
        "kv_policy": "ada_snapkv",
        "kv_budget": _BUDGET.value,
    }


async def served(url: str, prompts: list[list[int]]) -> float:
    """Sends all prompts at once to the server and returns the tokens/s."""
    async with httpx.AsyncClient(base_url=url, timeout=None) as client:
        began = time.perf_counter()
        bodies = [
            {"prompt": p, "max_tokens": _OUTPUT_LEN.value, "ignore_eos": True, "temperature": 0}
            for p in prompts
        ]
        asking = (stream(client, Answer(len(body["prompt"])), body) for body in bodies)
        answers = await asyncio.gather(*asking)
        seconds = time.perf_counter() - began
    if error := next((answer.error for answer in answers if answer.error), None):
        raise SystemExit(f"a request failed: {error}")
    return len(prompts) * _OUTPUT_LEN.value / seconds


def offline(llm: Any, prompts: list[list[int]]) -> float:
    """Generates from all prompts with the `LLM` and returns the tokens/s."""
    from fairkv_jax import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=_OUTPUT_LEN.value, ignore_eos=True)
    began = time.perf_counter()
    llm.generate(prompts, params)
    return len(prompts) * _OUTPUT_LEN.value / (time.perf_counter() - began)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    logging.getLogger("httpx").setLevel("WARNING")
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    device_count = f"--xla_force_host_platform_device_count={_DEVICES.value}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {device_count}"
    with server_process(options()) as url:
        from fairkv_jax import LLM

        chance = np.random.default_rng(0)
        ids = vocabulary(url, None)
        prompts = [random_prompt(chance, ids, _INPUT.value) for _ in range(_STREAMS.value)]
        llm = LLM(**options(), progress=False)
        offline(llm, prompts)
        asyncio.run(served(url, prompts))
        rounds = [
            (offline(llm, prompts), asyncio.run(served(url, prompts))) for _ in range(_ROUNDS.value)
        ]
    own, other = (median(values) for values in zip(*rounds, strict=True))
    results = {
        "options": options() | {"input_len": _INPUT.value, "output_len": _OUTPUT_LEN.value},
        "offline_tokens_per_s": own,
        "served_tokens_per_s": other,
        "ratio": other / own,
        "rounds": [{"offline": a, "served": b, "ratio": b / a} for a, b in rounds],
    }
    text = json.dumps(results, indent=2)
    print(text)
    if _RESULT.value:
        Path(_RESULT.value).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    app.run(main, argv=[with_underscores(argument) for argument in sys.argv])
