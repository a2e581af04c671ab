"""Measures long outputs with and without compression while decoding.

    python -m benchmarks.long_output --output result.json

Two engines generate as many tokens from the same prompt: one whose cache is compressed again at
`--kv-decode-budget`, and one whose cache grows. They take turns, a part of the output at a time, so
that noise affects both. Printed are the cache and the speed of each part. Besides the time that has
passed, the CPU time of the process is measured: other programs on the machine affect it less.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from absl import app, flags

from fairkv_jax.command_line import engine_flag, with_underscores

_MODEL = engine_flag("model")
_DEVICES = flags.DEFINE_integer("devices", 2, "Number of devices that share the model.")
_TOKENS = flags.DEFINE_integer("tokens", 4000, "Tokens to generate in each row.")
_ROWS = flags.DEFINE_integer("rows", 1, "Number of rows that generate at the same time.")
_PROMPT = flags.DEFINE_integer("prompt", 64, "Prompt tokens.")
_PART = flags.DEFINE_integer("part", 500, "Tokens of each part of the output that is timed.")
_BUDGET = engine_flag("kv_decode_budget", default=512)
_INTERVAL = engine_flag("kv_decode_interval")
_POLICY = engine_flag("kv_decode_policy")
_TEXT = flags.DEFINE_string("text", "README.md", "Path of the text that the prompt begins.")
_OUTPUT = flags.DEFINE_string("output", None, "Path to which the printed JSON is also written.")


class Generation:
    """An engine whose rows all generate; a call goes on until each has some more tokens."""

    def __init__(self, **options: Any):
        from fairkv_jax.engine.build import build_engine
        from fairkv_jax.engine.request import Request
        from fairkv_jax.sampling_params import SamplingParams

        room = _PROMPT.value + _TOKENS.value + 1
        engine = self.engine = build_engine(
            _MODEL.value,
            tensor_parallel_size=_DEVICES.value,
            max_model_len=room,
            max_num_seqs=_ROWS.value,
            dtype="float32",
            kv_policy="full",
            kv_cache_memory_bytes=4 << 30,
            progress=False,
            **options,
        )
        prompt = engine.tokenizer.encode(Path(_TEXT.value).read_text())[: _PROMPT.value]
        engine.warm_up([len(prompt)], _ROWS.value, prompt_logprobs=False)
        params = SamplingParams(temperature=0, max_tokens=_TOKENS.value, ignore_eos=True)
        for row in range(_ROWS.value):
            engine.add_request(Request(str(row), prompt, params))
        self._counts = dict.fromkeys(map(str, range(_ROWS.value)), 0)
        self._num_heads = engine.model_config.num_layers * engine.model_config.num_kv_heads
        self.parts: list[dict[str, Any]] = []
        self._run_to(1)

    def __call__(self) -> None:
        """Generates the next part of the output, and notes speed and cache."""
        start = min(self._counts.values())
        seconds, cpu_seconds = time.perf_counter(), time.process_time()
        most = self._run_to(min(start + _PART.value, _TOKENS.value))
        seconds, cpu_seconds = time.perf_counter() - seconds, time.process_time() - cpu_seconds
        count = min(self._counts.values()) - start
        self.parts.append(
            {
                "tokens": [start, start + count],
                "tokens_per_second": _ROWS.value * count / seconds,
                "cpu_ms_per_token": 1e3 * cpu_seconds / (_ROWS.value * count),
                "most_cached_per_head": most["tokens"],
                "most_page_tokens_per_head": most["page_tokens"],
            }
        )

    def _run_to(self, count: int) -> dict[str, float]:
        """Steps until each row has `count` tokens; returns the fullest that its cache has been."""
        spec, manager = self.engine.runner.cache_spec, self.engine.scheduler.kv_cache
        most = {"tokens": 0.0, "page_tokens": 0.0}
        while self.engine.has_unfinished_requests() and min(self._counts.values()) < count:
            for output in self.engine.step():
                self._counts[output.request_id] = len(output.outputs[0].token_ids)
            pairs = self._num_heads * _ROWS.value
            tokens = manager.committed_lengths.sum() / pairs
            page_tokens = manager.used_pages.sum() * spec.page_size / pairs
            most["tokens"] = max(most["tokens"], float(tokens))
            most["page_tokens"] = max(most["page_tokens"], float(page_tokens))
        return most


def summary(parts: list[dict[str, Any]]) -> dict[str, float]:
    """Puts the last part beside the first."""
    first, last = parts[0], parts[-1]
    return {
        "last_over_first_tokens_per_second": last["tokens_per_second"] / first["tokens_per_second"],
        "last_over_first_speed_by_cpu_time": first["cpu_ms_per_token"] / last["cpu_ms_per_token"],
        "most_cached_per_head": max(part["most_cached_per_head"] for part in parts),
        "most_page_tokens_per_head": max(part["most_page_tokens_per_head"] for part in parts),
    }


def print_table(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = ("cached per head", "tokens/s", "CPU ms/token")
    table = Table("tokens", *(f"{name}: {each}" for name in results["parts"] for each in columns))
    for parts in zip(*results["parts"].values(), strict=True):
        cells = [
            cell
            for part in parts
            for cell in (
                f"{part['most_cached_per_head']:.0f}",
                f"{part['tokens_per_second']:.1f}",
                f"{part['cpu_ms_per_token']:.1f}",
            )
        ]
        table.add_row("{} to {}".format(*parts[0]["tokens"]), *cells)
    Console(file=sys.stderr, width=160).print(table)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    if _TOKENS.value % _PART.value == 1:
        raise app.UsageError("the last part has one token: choose --tokens and --part otherwise")
    from fairkv_jax.command_line import make_cpu_devices

    make_cpu_devices(_DEVICES.value)
    load = os.getloadavg()
    generations = {
        "compressed": Generation(
            kv_decode_budget=_BUDGET.value,
            kv_decode_interval=_INTERVAL.value,
            kv_decode_policy=_POLICY.value,
        ),
        "growing": Generation(),
    }
    while any(each.engine.has_unfinished_requests() for each in generations.values()):
        for each in generations.values():
            each()
    results = {
        "options": {
            flag.name: flag.value
            for flag in (_DEVICES, _TOKENS, _ROWS, _PROMPT, _PART, _BUDGET, _INTERVAL, _POLICY)
        },
        "load_average_before_and_after": [load, os.getloadavg()],
        "num_cores": os.cpu_count(),
        "parts": {name: each.parts for name, each in generations.items()},
        "summary": {name: summary(each.parts) for name, each in generations.items()},
    }
    print_table(results)
    text = json.dumps(results, indent=1)
    print(text)
    if _OUTPUT.value:
        Path(_OUTPUT.value).write_text(text + "\n")


if __name__ == "__main__":
    app.run(main, argv=[with_underscores(argument) for argument in sys.argv])
