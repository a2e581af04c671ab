"""Measures the cost of paging and ragged lengths, and the gain of compression.

    python -m benchmarks.decode_step --output result.json

It times decode steps and prefills. Everything runs on one mesh in one process; compare the ratios,
not the times.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from absl import app, flags

from fairkv_jax.command_line import engine_flag, with_underscores

_MODEL = engine_flag("model")
_DEVICES = flags.DEFINE_integer("devices", 2, "Number of devices that share the model.")
_BATCH = flags.DEFINE_integer("batch", 8, "Rows of the decode batch.")
_CACHED = flags.DEFINE_integer(
    "cached", 512, "Cached tokens per head in the comparison with the dense step."
)
_PROMPT = flags.DEFINE_integer("prompt", 2048, "Prompt tokens in the measurement of compression.")
_BUDGET = engine_flag("kv_budget", default=256)
_PREFILL = flags.DEFINE_integer(
    "prefill", 1024, "Prompt tokens in the comparison with the dense prefill."
)
_REPEATS = flags.DEFINE_integer("repeats", 21, "Number of timed runs; the median is reported.")
_TEXT = flags.DEFINE_string("text", None, "Path of a text for the prompts; default: README.md.")
_OUTPUT = flags.DEFINE_string("output", None, "Path to which the printed JSON is also written.")

STRATEGIES = ("static", "fair_copying")
DISTINCT_PROMPTS = 4
"""Number of different prompts; further rows repeat them."""


def make_engine(strategy: str, max_model_len: int, **options: Any) -> Any:
    from fairkv_jax.engine.build import build_engine

    engine = build_engine(
        _MODEL.value,
        tensor_parallel_size=_DEVICES.value,
        max_model_len=max_model_len,
        max_num_seqs=_BATCH.value,
        dtype="float32",
        head_plan=strategy,
        kv_cache_memory_bytes=8 << 30,
        progress=False,
        **options,
    )
    return engine.runner, engine.tokenizer


def prompts(tokenizer: Any, num_tokens: int) -> list[list[int]]:
    """Returns prompts from a real text, because the tokens kept per head depend on the content."""
    ids = tokenizer.encode(Path(_TEXT.value or "README.md").read_text())
    ids *= 1 + (num_tokens + 97 * DISTINCT_PROMPTS) // len(ids)
    return [ids[97 * i : 97 * i + num_tokens] for i in range(DISTINCT_PROMPTS)]


class Filled:
    """A model runner whose rows all hold a prompt. A call runs one decode step for all rows."""

    def __init__(self, runner: Any, prompts: list[list[int]]):
        from fairkv_jax.engine.kv_cache_manager import KVCacheManager
        from fairkv_jax.engine.scheduler_output import Insertion, NewRequest, PrefillChunks
        from fairkv_jax.sampling_params import SamplingParams

        self.runner = runner
        self.kv_cache = KVCacheManager(runner.cache_spec, runner.layout)
        self._position = len(prompts[0])
        self._steps = 0
        for row in range(_BATCH.value):
            prompt = prompts[row % len(prompts)]
            new = NewRequest(str(row), prompt, SamplingParams(temperature=0), seed=0)
            chunks = runner.start_prefill(new).shape.num_chunks
            prefill = PrefillChunks(str(row), 0, chunks, chunks, 1.0, new)
            result = self._execute(prefill=prefill).result()
            lengths = self.kv_cache.reserve_prompt(row, result.prefill.kept.lengths)
            assert lengths is not None, "the pool is too small"
            self.kv_cache.activate(row)
            self._execute(insertion=Insertion(str(row), row, lengths, [1])).result()

    def __call__(self) -> Any:
        """Runs one decode step and returns its tokens as an array on the devices."""
        from fairkv_jax.engine.scheduler_output import Decode, DecodeRow

        self.kv_cache.reserve(1)
        rows = tuple(
            DecodeRow(row, str(row), self._position + self._steps, self._steps + 1)
            for row in range(_BATCH.value)
        )
        self._steps += 1
        return self._execute(decode=Decode(rows, 1, {})).sampled.tokens

    def _execute(self, **parts: Any) -> Any:
        from fairkv_jax.engine.scheduler_output import SchedulerOutput

        fields: dict[str, Any] = dict.fromkeys(("insertion", "prefill", "decode"))
        names = ("preempted_request_ids", "finished_request_ids", "released_rows")
        update = self.kv_cache.take_page_table_update()
        fields |= dict.fromkeys(names, ())
        fields |= parts
        output = SchedulerOutput(index=0, resets_cache=False, page_table_update=update, **fields)
        return self.runner.execute(output)

    def memory(self) -> dict[str, Any]:
        """Returns the fullest device's pages relative to the mean of cached tokens per device."""
        pages, tokens = self.kv_cache.used_pages, self.kv_cache.tokens_per_device.sum(0)
        page_size = self.runner.cache_spec.page_size
        return {
            "tokens_per_device": tokens.tolist(),
            "page_tokens_per_device": (pages * page_size).tolist(),
            "fullest_over_mean": int(pages.max()) * page_size / tokens.mean(),
            "fullest_over_mean_without_rounding": float(tokens.max() / tokens.mean()),
        }


def against_dense(strategy: str) -> dict[str, float]:
    """Times the paged decode step with equal lengths in all heads, and the dense step."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    from benchmarks.dense import dense_step
    from benchmarks.timing import median_ms

    room = _CACHED.value + _REPEATS.value + 8
    plain, _ = make_engine("static", room)
    paged, tokenizer = make_engine(strategy, room)
    model = plain.model_config
    shape = (model.num_layers, plain.layout.num_slots, _BATCH.value, room, model.head_dim)
    by_slot = NamedSharding(plain.mesh, PartitionSpec(None, "tensor"))
    caches = [jnp.zeros(shape, device=by_slot) for _ in range(2)]
    tokens = np.ones(_BATCH.value, np.int32)
    position = _CACHED.value

    def dense() -> jax.Array:
        nonlocal caches, position
        at = np.int32(position)
        caches, out = dense_step(plain.model, tuple(caches), tokens, at, mesh=plain.mesh)
        position += 1
        return out

    step = Filled(paged, prompts(tokenizer, _CACHED.value)[:1])
    return median_ms({"dense": dense, "paged": step}, _REPEATS.value)


def against_full(strategy: str, results: dict[str, Any]) -> dict[str, float]:
    """Times decode steps after long prompts, with and without compression."""
    from benchmarks.timing import median_ms

    room = _PROMPT.value + _REPEATS.value + 8
    steps = {}
    for policy, options in (("full", {}), ("ada_snapkv", {"kv_budget": _BUDGET.value})):
        engine, tokenizer = make_engine(strategy, room, kv_policy=policy, **options)
        count = 1 if policy == "full" else DISTINCT_PROMPTS  # `full` keeps every token.
        steps[policy] = Filled(engine, prompts(tokenizer, _PROMPT.value)[:count])
        results["memory"][f"{strategy} {policy}"] = steps[policy].memory()
    return median_ms(steps, _REPEATS.value)


def prefills() -> dict[str, float]:
    """Times the dense prefill, and prefills without and with compression."""
    from benchmarks.dense import dense_prefill
    from benchmarks.timing import median_ms

    full, tokenizer = make_engine("static", _PREFILL.value)
    ada, _ = make_engine("static", _PREFILL.value, kv_policy="ada_snapkv", kv_budget=_BUDGET.value)
    import numpy as np

    prompt = prompts(tokenizer, _PREFILL.value)[0]
    tokens = np.array(prompt, np.int32)
    return median_ms(
        {
            "dense": lambda: dense_prefill(full.model, tokens, mesh=full.mesh),
            "full": lambda: full.prefill(prompt),
            "ada_snapkv": lambda: ada.prefill(prompt),
        },
        max(3, _REPEATS.value // 4),
    )


def print_table(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("what", "ms", "ratio", title="decode step and prefill")
    for strategy, ms in results["step_against_dense"].items():
        ratio = ms["paged"] / ms["dense"]
        table.add_row(f"step, dense ({_CACHED.value} tokens per head)", f"{ms['dense']:.1f}", "1")
        table.add_row(f"step, {strategy}", f"{ms['paged']:.1f}", f"{ratio:.2f} x dense")
    for strategy, ms in results["step_against_full"].items():
        ratio = ms["full"] / ms["ada_snapkv"]
        table.add_row(f"step after {_PROMPT.value}, {strategy} full", f"{ms['full']:.1f}", "1")
        name = f"step after {_PROMPT.value}, {strategy} ada_snapkv {_BUDGET.value}"
        table.add_row(name, f"{ms['ada_snapkv']:.1f}", f"{ratio:.2f} x faster")
    for name, ms in results["prefill"].items():
        ratio = ms / results["prefill"]["dense"]
        table.add_row(f"prefill of {_PREFILL.value}, {name}", f"{ms:.0f}", f"{ratio:.2f} x dense")
    for name, figures in results["memory"].items():
        ratio = f"{figures['fullest_over_mean']:.3f} x mean"
        table.add_row(f"pool of the fullest device, {name}", "", ratio)
    Console(width=110).print(table)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    device_count = f"--xla_force_host_platform_device_count={_DEVICES.value}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {device_count}"
    import jax

    results: dict[str, Any] = {
        "flags": {
            f.name: f.value
            for f in flags.FLAGS.get_key_flags_for_module(sys.argv[0])
            if f.name != _OUTPUT.name
        },
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "memory": {},
    }
    results["step_against_dense"] = {s: against_dense(s) for s in STRATEGIES}
    results["step_against_full"] = {s: against_full(s, results) for s in STRATEGIES}
    results["prefill"] = prefills()
    print_table(results)
    text = json.dumps(results, indent=2)
    print(text)
    if _OUTPUT.value:
        Path(_OUTPUT.value).write_text(text + "\n")


if __name__ == "__main__":
    app.run(main, argv=[with_underscores(argument) for argument in sys.argv])
