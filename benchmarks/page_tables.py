"""Measures the memory of page tables on devices and host, and the bytes that an insert uploads.

    python -m benchmarks.page_tables

It runs on the host only, and fills a `KVCacheManager` with random kept lengths.
"""

import sys
import time
from dataclasses import dataclass

import numpy as np
from absl import app, flags

from fairkv_jax.command_line import with_underscores
from fairkv_jax.engine.kv_cache_manager import KVCacheManager
from fairkv_jax.kv_cache_spec import KVCacheSpec
from fairkv_jax.plan import Profile, make_plan
from fairkv_jax.sharding.slots import SlotLayout

_CONTEXT = flags.DEFINE_integer("max_model_len", 131_072, "Maximum tokens per request.")
_KEPT = flags.DEFINE_integer("kept", 2048, "Mean prompt tokens kept per head.")


@dataclass(frozen=True)
class Case:
    """A model, its devices, and the memory of each device for the KV cache."""

    name: str
    num_layers: int
    num_kv_heads: int
    num_devices: int
    num_rows: int
    gib_per_device: float


CASES = (
    Case("Llama-3.1-8B", 32, 8, 1, 64, 50),
    Case("Llama-3.1-8B", 32, 8, 8, 256, 65),
    Case("Llama-3.3-70B", 80, 8, 8, 256, 100),
)


def measure(case: Case) -> list[str]:
    """Returns the cells of one row of the table."""
    tokens = ((float(_KEPT.value),) * case.num_kv_heads,) * case.num_layers
    profile = Profile(case.name, "full", None, tokens)
    layout = SlotLayout.from_plan(make_plan(profile, case.num_devices, "static"))
    slots = max(layout.slots_per_device, 2)
    spec = KVCacheSpec.fit(
        int(case.gib_per_device * 2**30) * case.num_devices,
        1 << 40,
        num_layers=case.num_layers,
        num_rows=case.num_rows,
        num_devices=case.num_devices,
        slots_per_device=layout.slots_per_device,
        head_dim=128,
        page_size=16,
        max_tokens=_CONTEXT.value,
        dtype="bfloat16",
    )
    manager, rng = KVCacheManager(spec, layout), np.random.default_rng(0)
    uploads, seconds = [], []
    for row in range(min(case.num_rows, 32)):
        shape = (case.num_layers, case.num_kv_heads)
        lengths = rng.integers(1, 2 * _KEPT.value, shape).astype(np.int32)
        began = time.perf_counter()
        placed = manager.reserve_prompt(row, lengths)
        manager.activate(row)
        update = manager.take_page_table_update()
        seconds.append(time.perf_counter() - began)
        assert placed is not None
        uploads.append(8 * (update.num_entries + len(update.start_index)) + placed.nbytes)
    pool = spec.pages_per_device * spec.page_bytes
    host = manager.num_table_bytes / (pool * case.num_devices)
    dense_entries = case.num_layers * slots * -(-_CONTEXT.value // 16)
    return [
        f"{case.name} on {case.num_devices}, {case.num_rows} rows",
        f"{pool / 2**30:.1f} GiB",
        f"{spec.table_bytes_per_device / 2**20:.0f} MiB = {spec.table_bytes_per_device / pool:.2%}",
        f"{host:.2%}",
        f"{4 * dense_entries * case.num_rows / 2**20:,.0f} MiB",
        f"{np.mean(uploads) / 2**20:.2f} MiB",
        f"{4 * dense_entries * case.num_devices / 2**20:.1f} MiB",
        f"{1000 * np.median(seconds):.1f} ms",
    ]


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    rows = [
        [
            "model and batch",
            "pool per device",
            "tables per device",
            "host tables relative to the pool",
            "dense tables per device",
            "upload per insert",
            "upload per insert, dense",
            "host time per insert",
        ],
        *map(measure, CASES),
    ]
    print(f"context of {_CONTEXT.value} tokens, {_KEPT.value} tokens kept per head on average\n")
    print("\n---|---|---|---|---|---|---|---\n".join(" | ".join(row) for row in rows[:2]))
    print("\n".join(" | ".join(row) for row in rows[2:]))


if __name__ == "__main__":
    app.run(main, argv=[with_underscores(argument) for argument in sys.argv])
