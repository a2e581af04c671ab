"""Measures the time to the first token of short prompts that arrive together.

    python -m benchmarks.short_prompts --output result.json

Prompts that are packed into the same chunks are compared with prompts that are prefilled one after
the other, in turns and by one engine.
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from absl import app, flags

from fairkv_jax.command_line import engine_flag, with_underscores

_MODEL = engine_flag("model")
_DEVICES = flags.DEFINE_integer("devices", 2, "Number of devices that share the model.")
_PROMPTS = flags.DEFINE_integer("prompts", 16, "Prompts that arrive together.")
_TOKENS = flags.DEFINE_integer("tokens", 64, "Tokens of each prompt.")
_REPEATS = flags.DEFINE_integer("repeats", 7, "Measurements of each; medians are printed.")
_OUTPUT = flags.DEFINE_string("output", None, "Path to which the printed JSON is also written.")


def first_tokens(engine: Any, prompts: list[list[int]]) -> list[float]:
    """Seconds until each prompt has its first token, from the time when all arrive."""
    from fairkv_jax.engine.request import Request
    from fairkv_jax.sampling_params import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    start, seconds = time.perf_counter(), {}
    for index, prompt in enumerate(prompts):
        engine.add_request(Request(str(index), prompt, params))
    while engine.has_unfinished_requests():
        for output in engine.step():
            seconds.setdefault(output.request_id, time.perf_counter() - start)
    return sorted(seconds.values())


def measure() -> dict[str, Any]:
    from fairkv_jax.engine.build import build_engine

    engine = build_engine(
        _MODEL.value,
        tensor_parallel_size=_DEVICES.value,
        max_model_len=max(2 * _TOKENS.value, 2048),
        max_num_seqs=_PROMPTS.value,
        dtype="float32",
        kv_policy="full",
        progress=False,
    )
    engine.warm_up([_TOKENS.value], _PROMPTS.value, prompt_logprobs=False)
    size = engine.model_config.vocab_size
    prompts = [
        [(7919 * index + 104729 * token) % size for token in range(_TOKENS.value)]
        for index in range(_PROMPTS.value)
    ]
    packing = engine.scheduler.packing
    assert packing is not None
    ways = {"one after the other": None, "packed": packing}
    found: dict[str, list[list[float]]] = {name: [] for name in ways}
    for turn in range(1 + _REPEATS.value):
        for name, way in ways.items():
            engine.scheduler.packing = way
            seconds = first_tokens(engine, prompts)
            if turn:  # the first is a warm-up
                found[name].append(seconds)
    medians = {
        name: {
            "first": statistics.median(run[0] for run in runs),
            "mean": statistics.median(map(statistics.mean, runs)),
            "last": statistics.median(run[-1] for run in runs),
        }
        for name, runs in found.items()
    }
    apart, together = medians.values()
    return {
        "prompts": _PROMPTS.value,
        "tokens": _TOKENS.value,
        "devices": _DEVICES.value,
        "most_packed_tokens": packing.max_tokens,
        "load_average": os.getloadavg()[0],
        "seconds_to_first_token": medians,
        "last_over_one_after_the_other": together["last"] / apart["last"],
    }


def main(_arguments: list[str]) -> None:
    device_count = f"--xla_force_host_platform_device_count={_DEVICES.value}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {device_count}"
    text = json.dumps(measure(), indent=1)
    print(text)
    if _OUTPUT.value:
        Path(_OUTPUT.value).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    app.run(main, [with_underscores(argument) for argument in sys.argv])
