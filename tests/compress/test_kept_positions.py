"""`return_kept_positions` through the whole engine, against NumPy, for every policy."""

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fairkv_jax import LLM
from tests.engine.drive import greedy, random_prompt
from tests.oracle.forward import Forward, forward, read_llama
from tests.oracle.selection import Options, kept_positions

LENGTHS = (128, 101, 66)  # one bucket
SIZES: tuple[dict[str, Any], ...] = (
    {"budget": 80},
    {"ratio": 0.375},
)  # 80 of 128: one program for both
SCORED: list[tuple[str, dict[str, Any]]] = [
    ("snapkv", {}),
    *(("ada_snapkv", {"safeguard": floor}) for floor in ("blend", "reserve")),
]


def all_options() -> list[Options]:
    options = [Options("full"), *(Options("streaming_llm", **size) for size in SIZES)]
    for (policy, floor), pool, first in product(SCORED, ("max", "avg"), (False, True)):
        for size in SIZES:
            scored: dict[str, Any] = {
                "window": 16,
                "kernel": 5,
                "pooling": pool,
                "pool_first": first,
                **floor,
            }
            options.append(Options(policy, **scored, **size))
    return options


@pytest.fixture(scope="module")
def dense(tiny_checkpoint: Path) -> dict[int, Forward]:
    model = read_llama(tiny_checkpoint)
    return {length: forward(model, random_prompt(length)) for length in LENGTHS}


def name(options: Options) -> str:
    size = f"{options.budget} tokens" if options.budget else f"ratio {options.ratio}"
    if options.policy in ("full", "streaming_llm"):
        return f"{options.policy}, {size}"
    order = "pool first" if options.pool_first else "mean first"
    return f"{options.policy} {options.safeguard} {options.pooling} {order}, {size}"


@pytest.mark.parametrize("options", all_options(), ids=name)
def test_kept_positions(tiny_checkpoint: Path, dense: dict[int, Forward], options: Options):
    llm = LLM(
        model=tiny_checkpoint,
        tensor_parallel_size=2,
        kv_policy=options.policy,
        kv_budget=options.budget,
        kv_ratio=options.ratio,
        kv_window=options.window,
        kv_pooling=options.pooling,
        kv_kernel=options.kernel,
        kv_pool_first=options.pool_first,
        kv_safeguard=options.safeguard,
        kv_alpha_safeguard=options.alpha_safeguard,
        max_model_len=256,
        max_num_seqs=1,
        progress=False,
    )
    prompts = [random_prompt(length) for length in LENGTHS]
    for output in llm.generate(prompts, greedy(1), return_kept_positions=True):
        forward = dense[len(output.prompt_token_ids)]
        assert output.kept_positions is not None
        assert output.kv_lengths is not None
        for layer, (q, k) in enumerate(zip(forward.q, forward.k, strict=True)):
            for head, want in enumerate(kept_positions(q, k, options)):
                np.testing.assert_array_equal(output.kept_positions[layer][head], want)
                assert output.kv_lengths[layer, head] == len(want)
