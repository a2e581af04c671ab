"""Scorers and allocators against the NumPy selection, over the whole range of their options."""

from dataclasses import asdict, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fairkv_jax.compress import POLICIES, Policy, make_policy
from fairkv_jax.compress.scorers import WindowAttention
from fairkv_jax.config import KVConfig
from tests.oracle.selection import Options, kept_positions, snapkv_scores

PADDED, GROUP, HEADS, WIDTH = 96, 2, 3, 8


def queries_and_keys(length: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """q [N, T, H], k [K, T, H]; heads differ in how sharply they attend."""
    rng = np.random.default_rng([seed, length])
    q = rng.standard_normal((HEADS * GROUP, length, WIDTH), dtype=np.float32)
    k = rng.standard_normal((HEADS, length, WIDTH), dtype=np.float32)
    return q * np.repeat([0.3, 1.0, 3.0], GROUP)[:, None, None].astype(np.float32), k


@partial(jax.jit, static_argnames="policy")
def select(policy: Policy, q, k, length, budget):
    scores = policy.scorer(q, k, length, budget)
    return policy.select(scores, length, jnp.full(len(scores), budget))


def window_queries(q: np.ndarray, size: int) -> np.ndarray:
    """The last queries [K, G, w, H]; what stands behind those of a short prompt must not matter."""
    T = q.shape[1]
    window = np.full((HEADS, GROUP, min(size, PADDED), WIDTH), 9.0, np.float32)
    last = q[:, max(T - window.shape[2], 0) :]
    window[:, :, : last.shape[1]] = last.reshape(HEADS, GROUP, -1, WIDTH)
    return window


def selected(options: Options, q: np.ndarray, k: np.ndarray) -> list[np.ndarray]:
    """What our policy keeps of the prompt, padded with large keys that must not matter."""
    T = q.shape[1]
    policy = make_policy(KVConfig(**asdict(options)))
    padded = np.pad(k, [(0, 0), (0, PADDED - T), (0, 0)], constant_values=9.0)
    window = window_queries(q, policy.scorer.window)
    kept = select(policy, window, padded, np.int32(T), np.int32(options.kept_tokens(T)))
    return [np.flatnonzero(row) for row in np.asarray(kept)]


def check(options: Options, length: int, seed: int = 0) -> None:
    q, k = queries_and_keys(length, seed)
    got = selected(options, q, k)
    for head, want in enumerate(kept_positions(q, k, options)):
        np.testing.assert_array_equal(got[head], want, f"{options}, T={length}, {head=}")


def scored(policy: str, **options) -> Options:
    defaults: dict[str, Any] = {"window": 8, "kernel": 5}
    return Options(policy, **defaults | options)


ADA = [scored("ada_snapkv", safeguard=floor, budget=24) for floor in ("blend", "reserve")]
SCORED = [scored("snapkv", budget=24), *ADA]
ALL = [Options("full"), Options("streaming_llm", budget=24), *SCORED]


@pytest.mark.parametrize("pool_first", [False, True])
@pytest.mark.parametrize("pool", ["max", "avg"])
@pytest.mark.parametrize("options", SCORED, ids=lambda o: f"{o.policy}-{o.safeguard}")
def test_pools_and_orders(options: Options, pool: str, pool_first: bool):
    options = replace(options, pooling=pool, pool_first=pool_first)
    for length in (96, 95, 50, 25, 24, 23, 8, 1):
        check(options, length)


@pytest.mark.parametrize("kernel", [1, 3, 9, 31])
@pytest.mark.parametrize("pool", ["max", "avg"])
def test_kernels(pool: str, kernel: int):
    """Up to one that is wider than what lies outside the window."""
    options = scored("ada_snapkv", budget=24, pooling=pool, kernel=kernel)
    for length in (96, 25, 33):
        check(options, length)


@pytest.mark.parametrize("floor", ["blend", "reserve"])
@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.29, 0.5, 0.9, 1.0])
def test_alphas(floor: str, alpha: float):
    for budget in (9, 24, 64):
        check(scored("ada_snapkv", safeguard=floor, alpha_safeguard=alpha, budget=budget), 90)


@pytest.mark.parametrize(("floor", "budget"), [("blend", 83), ("reserve", 75)])
def test_products_that_are_whole_are_not_rounded_down(floor: str, budget: int):
    """0.84 * 75 is 63, though a little less in float32."""
    check(scored("ada_snapkv", safeguard=floor, alpha_safeguard=0.84, budget=budget), 96)


@pytest.mark.parametrize("options", ALL[1:], ids=lambda o: f"{o.policy}-{o.safeguard}")
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_ratios(options: Options, ratio: float):
    """Down to one kept token, where the window shrinks with the budget."""
    options = replace(options, budget=None, ratio=ratio)
    for length in (96, 77, 11, 3, 1):
        check(options, length)


@pytest.mark.parametrize("window", [1, 7, 24])
@pytest.mark.parametrize("options", SCORED, ids=lambda o: f"{o.policy}-{o.safeguard}")
def test_windows(options: Options, window: int):
    """Up to one that fills the budget."""
    options = replace(options, window=window)
    for length in (96, 40, 25):
        check(options, length)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("options", ADA, ids=lambda o: o.safeguard)
def test_random_prompts(options: Options, seed: int):
    check(options, 96, seed)


@pytest.mark.parametrize("budget", [1, 2, 4, 5, 6, 95])
def test_streaming_llm_budgets(budget: int):
    check(Options("streaming_llm", budget=budget), 96)


@pytest.mark.parametrize("options", ALL, ids=lambda o: f"{o.policy}-{o.safeguard}")
def test_a_prompt_within_the_budget_is_kept_whole(options: Options):
    for length in (24, 10, 1):
        for kept in selected(options, *queries_and_keys(length)):
            np.testing.assert_array_equal(kept, np.arange(length))


def test_reserve_meets_the_budget_and_blend_nearly():
    q, k = queries_and_keys(96)
    totals = [sum(map(len, selected(options, q, k))) for options in ADA]
    assert totals[1] == 24 * HEADS
    assert abs(totals[0] - 24 * HEADS) <= 2


def test_ada_moves_budget_to_the_heads_whose_scores_are_high():
    """Otherwise the comparisons above would not tell Ada-SnapKV from SnapKV."""
    for options in ADA:
        lengths = [len(kept) for kept in selected(options, *queries_and_keys(96))]
        assert max(lengths) - min(lengths) >= 8


@pytest.mark.parametrize("pool_first", [False, True])
@pytest.mark.parametrize("pool", ["max", "avg"])
def test_scores(pool: str, pool_first: bool):
    """The numbers themselves; window and padding score 0."""
    q, k = queries_and_keys(60)
    options = scored("snapkv", budget=24, pooling=pool, pool_first=pool_first)
    scorer: Any = WindowAttention(8, pool, 5, pool_first)
    got = np.asarray(scorer(window_queries(q, 8), k, np.int32(60), np.int32(24)))
    np.testing.assert_allclose(got[:, :52], snapkv_scores(q, k, 8, options), rtol=1e-4, atol=1e-7)


def test_equal_scores_go_to_the_earlier_token_and_the_lower_head():
    """Constant keys: every score in a head is the same, up to the last few under the pool."""
    q = np.zeros((HEADS * GROUP, 64, WIDTH), np.float32)
    k = np.ones((HEADS, 64, WIDTH), np.float32)
    for options in (scored("snapkv", budget=24), *ADA):
        got = selected(options, q, k)
        for head, want in enumerate(kept_positions(q, k, options)):
            np.testing.assert_array_equal(got[head], want)


def test_unknown_policies_are_named_with_those_that_exist():
    with pytest.raises(
        ValueError, match=f"unknown kv_policy 'h2o': use one of {', '.join(POLICIES)}"
    ):
        make_policy(KVConfig("h2o", budget=64))


@pytest.mark.parametrize("policy", ["snapkv", "ada_snapkv"])
def test_a_budget_below_the_window(policy: str):
    with pytest.raises(
        ValueError,
        match="kv_budget 16 is smaller than the window 32: raise kv_budget or lower kv_window",
    ):
        make_policy(KVConfig(policy, budget=16))
    make_policy(KVConfig(policy, budget=16, window=16))
    make_policy(KVConfig("streaming_llm", budget=16))  # it has no window


@pytest.mark.parametrize("options", ALL, ids=lambda o: f"{o.policy}-{o.safeguard}")
def test_policies_are_values(options: Options):
    """Static arguments of the prefill: equal options share one program."""
    one, other = (make_policy(KVConfig(**asdict(options))) for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)
