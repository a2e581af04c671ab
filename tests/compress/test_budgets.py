"""Policies whose budgets differ by layer or head: PyramidKV and tables of head budgets."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fairkv_jax import LLM
from fairkv_jax.compress.budgets import MaxKept, budgets_per_head, num_kept_tokens
from fairkv_jax.config import KVConfig
from fairkv_jax.plan import HeadScores, Profile
from tests.engine.drive import greedy, random_prompt
from tests.oracle.forward import forward, read_llama
from tests.oracle.selection import Options, kept_positions

WINDOW = 8
OPTIONS = {"kv_window": WINDOW, "max_num_seqs": 1, "max_model_len": 256, "progress": False}


@pytest.mark.parametrize(
    ("options", "prompt_tokens", "kept"),
    [
        ({}, 100, 100),
        ({"policy": "snapkv", "budget": 64}, 100, 64),
        ({"policy": "snapkv", "budget": 64}, 10, 10),
        ({"policy": "snapkv", "ratio": 0.9}, 1005, 100),
        ({"policy": "snapkv", "ratio": 0.99}, 5, 1),
        ({"policy": "snapkv", "ratio": 0}, 7, 7),
    ],
)
def test_num_kept_tokens(options: dict[str, Any], prompt_tokens: int, kept: int):
    assert num_kept_tokens(KVConfig(**options), prompt_tokens) == kept


def test_budgets_are_imported_without_jax():
    code = "import sys, fairkv_jax.compress.budgets; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("layers", [1, 2, 5, 30, 80])
@pytest.mark.parametrize("tokens", [70, 100, 180, 2000])
def test_a_pyramid_falls_and_keeps_the_mean(layers: int, tokens: int):
    config = KVConfig("pyramidkv", budget=64, window=WINDOW)
    budgets = np.array(budgets_per_head(config, tokens, layers, 3))
    assert budgets.shape == (layers, 3)
    assert budgets[:, 0].sum() == 64 * layers
    assert budgets.max() <= tokens
    assert budgets.min() >= WINDOW
    assert (np.diff(budgets[:, 0]) <= 1).all()  # rounding may lift a layer by one
    bounds = MaxKept.of(config, tokens, layers, 3)
    assert bounds.in_one_layer >= budgets.sum(1).max()
    assert bounds.in_all_layers >= budgets.sum()


def test_a_pyramid_of_long_prompts_spans_a_twentieth_to_the_rest():
    budgets = budgets_per_head(KVConfig("pyramidkv", budget=108, window=WINDOW), 4000, 11, 1)
    assert (budgets[0], budgets[-1]) == ((WINDOW + 195,), (WINDOW + 5,))
    assert budgets_per_head(KVConfig("pyramidkv", budget=64), 50, 4, 2) == ((50, 50),) * 4


@pytest.mark.parametrize("tokens", [1, 15, 16, 40, 200, 5000])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.9])
def test_budgets_by_head_scores(tokens: int, ratio: float):
    """A score of zero or less keeps as little as may be; the total is exact where it can be."""
    scores = HeadScores("m", "test", ((0.0, 1e-9, 0.04), (-1.0, 0.16, 0.64)), sinks=4, recent=12)
    config = KVConfig("retrieval_keydiff", ratio=ratio, head_scores=scores)
    budgets = np.array(budgets_per_head(config, tokens, 2, 3))
    least, pairs = min(16, tokens), 6
    assert budgets.min() >= least
    assert budgets.max() <= tokens
    total = pairs * tokens - int(pairs * tokens * ratio)
    assert budgets.sum() == max(total, pairs * least)
    order = np.argsort(scores.array, axis=None)
    assert (np.diff(budgets.ravel()[order]) >= 0).all()
    if (tokens, ratio) == (5000, 0.9):
        np.testing.assert_allclose(budgets[1, 1] / budgets[0, 2], 2, rtol=0.01)


def test_a_pyramid_keeps_what_snapkv_keeps_at_each_budget(tiny_checkpoint: Path):
    llm = LLM(tiny_checkpoint, kv_policy="pyramidkv", kv_budget=24, **OPTIONS)
    prompt = random_prompt(120)
    (output,) = llm.generate([prompt], greedy(2), return_kept_positions=True)
    seen = forward(read_llama(tiny_checkpoint), prompt)
    budgets = budgets_per_head(KVConfig("pyramidkv", budget=24, window=WINDOW), 120, 2, 3)
    assert budgets[0] != budgets[1]
    assert output.kept_positions is not None
    for layer, positions in enumerate(output.kept_positions):
        options = Options("snapkv", budget=budgets[layer][0], window=WINDOW)
        expected = kept_positions(seen.q[layer], seen.k[layer], options)
        for got, wanted in zip(positions, expected, strict=True):
            np.testing.assert_array_equal(got, wanted)


def test_heads_keep_what_the_table_says(tiny_checkpoint: Path, tmp_path: Path):
    table = ((10, 60, 200), (16, 120, 8))
    profile = Profile("tiny", "head_budgets", None, table)
    file = tmp_path / "profile.json"
    file.write_text(profile.to_json())
    options = {"kv_policy": "head_budgets", "kv_head_budgets": file, **OPTIONS}
    llm = LLM(tiny_checkpoint, **options)
    prompt = random_prompt(120)
    (output,) = llm.generate([prompt], greedy(6), return_kept_positions=True)
    np.testing.assert_array_equal(output.kv_lengths, np.minimum(table, 120))
    assert output.kept_positions is not None
    np.testing.assert_array_equal(output.kept_positions[0][2], np.arange(120))
    seen = forward(read_llama(tiny_checkpoint), prompt)
    snapkv = Options("snapkv", budget=60, window=WINDOW)
    expected = kept_positions(seen.q[0], seen.k[0], snapkv)[1]
    np.testing.assert_array_equal(output.kept_positions[0][1], expected)
    sharded = LLM(tiny_checkpoint, tensor_parallel_size=2, **options)
    (other,) = sharded.generate([prompt], greedy(6))
    assert other.outputs[0].token_ids == output.outputs[0].token_ids


def test_a_small_budget_leaves_the_other_heads_their_windows(tiny_checkpoint: Path):
    """Head 0 keeps one token, and heads 1 and 2 keep the window that they would keep without it."""
    table = ((1, 20, 60), (40, 3, 9))
    profile = Profile("tiny", "head_budgets", None, table)
    llm = LLM(tiny_checkpoint, kv_policy="head_budgets", kv_head_budgets=profile, **OPTIONS)
    prompt = random_prompt(120)
    (output,) = llm.generate([prompt], greedy(2), return_kept_positions=True)
    seen = forward(read_llama(tiny_checkpoint), prompt)
    assert output.kept_positions is not None
    for layer, budgets in enumerate(table):
        options = Options("snapkv", budget=1, window=WINDOW)
        expected = kept_positions(seen.q[layer], seen.k[layer], options, budgets)
        for got, wanted in zip(output.kept_positions[layer], expected, strict=True):
            np.testing.assert_array_equal(got, wanted)


def test_tables_must_fit(tiny_checkpoint: Path):
    wrong = Profile("other", "head_budgets", None, ((10, 20),) * 2)
    with pytest.raises(
        ValueError, match=r"table of 2 x 2, but the model has 2 layers x 3 KV heads"
    ):
        LLM(tiny_checkpoint, kv_policy="head_budgets", kv_head_budgets=wrong, **OPTIONS)
    with pytest.raises(ValueError, match="give both"):
        LLM(tiny_checkpoint, kv_policy="head_budgets", **OPTIONS)
    with pytest.raises(ValueError, match=r"'nothing.json' is not a file"):
        LLM(tiny_checkpoint, kv_policy="head_budgets", kv_head_budgets="nothing.json", **OPTIONS)
    with pytest.raises(ValueError, match="takes neither"):
        LLM(tiny_checkpoint, kv_policy="head_budgets", kv_head_budgets=wrong, kv_budget=9)


def test_a_prompt_that_is_repeated_has_room_for_all_of_it_until_then():
    bounds = MaxKept.of(KVConfig("kvzip", ratio=0.8), 100, num_layers=30, num_heads=3)
    assert bounds == MaxKept(in_all_layers=30 * 3 * 100, in_one_layer=3 * 100)
