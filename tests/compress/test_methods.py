"""Scorers and allocators against the NumPy selection, over the whole range of their options."""

from dataclasses import asdict, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fairkv_jax.compress.contract import Chunk, LayerShape, Method
from fairkv_jax.compress.registry import make_method, query_agnostic_policies
from fairkv_jax.compress.snapkv import WindowAttention
from fairkv_jax.config import POLICIES, KVConfig
from tests.oracle.selection import Options, kept_positions, snapkv_scores

PADDED, CHUNK, GROUP, HEADS, WIDTH = 96, 16, 2, 3, 8


def queries_and_keys(length: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns q [N, T, H] and k [K, T, H]; heads differ in how sharply they attend."""
    rng = np.random.default_rng([seed, length])
    q = rng.standard_normal((HEADS * GROUP, length, WIDTH), dtype=np.float32)
    k = rng.standard_normal((HEADS, length, WIDTH), dtype=np.float32)
    return q * np.repeat([0.3, 1.0, 3.0], GROUP)[:, None, None].astype(np.float32), k


@partial(jax.jit, static_argnames="method")
def select(method: Method, q, k, length, budgets):
    """Runs a layer's chunks past the scorer, as the prefill does, and selects; q [T, K, G, H]."""
    scorer, num_tokens = method.scorer, k.shape[1]
    stats = scorer.init(LayerShape(HEADS, GROUP, WIDTH, num_tokens, q.dtype))
    for start in range(0, num_tokens, CHUNK):
        unread: Any = None  # by these scorers
        chunk = Chunk(
            length,
            jnp.int32(0),
            start + jnp.arange(CHUNK),
            frequencies=unread,
            x=unread,
            q_unrotated=unread,
            q=q[start : start + CHUNK],
            k=k[:, start : start + CHUNK].swapaxes(0, 1),
            v=unread,
            w_o=unread,
        )
        stats = scorer.observe(stats, chunk)
    scores = scorer.score(stats, k, k, length, jnp.minimum(budgets, length))
    return method.select(scores, budgets, length)


def selected(
    options: Options, q: np.ndarray, k: np.ndarray, budgets: tuple[int, ...] | None = None
) -> list[np.ndarray]:
    """Returns what our method keeps of a prompt that is padded with large values."""
    T = q.shape[1]
    method = make_method(KVConfig(**asdict(options)))
    padding = [(0, 0), (0, PADDED - T), (0, 0)]
    q, k = (np.pad(x, padding, constant_values=9.0) for x in (q, k))
    q = q.reshape(HEADS, GROUP, PADDED, WIDTH).transpose(2, 0, 1, 3)
    own = np.array(budgets or (options.kept_tokens(T),) * HEADS, np.int32)
    kept = select(method, q, k, np.int32(T), own)
    return [np.flatnonzero(row) for row in np.asarray(kept)]


def check(
    options: Options, length: int, seed: int = 0, budgets: tuple[int, ...] | None = None
) -> None:
    q, k = queries_and_keys(length, seed)
    got = selected(options, q, k, budgets)
    for head, want in enumerate(kept_positions(q, k, options, budgets)):
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
    """Up to a kernel that is wider than the part of the prompt outside the window."""
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


@pytest.mark.parametrize("budgets", [(1, 24, 40), (24, 3, 7), (9, 8, 30), (5, 60, 5)])
@pytest.mark.parametrize("options", ALL[1:], ids=lambda o: f"{o.policy}-{o.safeguard}")
def test_heads_are_protected_by_their_own_budgets(options: Options, budgets: tuple[int, ...]):
    """A head whose budget is smaller than window or sinks takes none of them from other heads."""
    for length in (96, 61):
        check(options, length, budgets=budgets)


@pytest.mark.parametrize("options", ALL[1:3], ids=lambda o: o.policy)
def test_a_head_within_its_own_budget_is_kept_whole(options: Options):
    for budgets in ((96, 24, 1), (500, 9, 95)):
        check(options, 96, budgets=budgets)


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
    """The scores themselves; the window of each head is its own."""
    q, k = queries_and_keys(60)
    options = scored("snapkv", budget=24, pooling=pool, pool_first=pool_first)
    scorer = WindowAttention(8, pool, 5, pool_first)
    window: Any = q[:, -8:].reshape(HEADS, GROUP, 8, WIDTH)
    keys: Any = k
    budgets: Any = np.array([24, 8, 3], np.int32)
    got = np.asarray(scorer.score(window, keys, keys, jnp.int32(60), budgets).primary)
    for head, size in enumerate((8, 8, 3)):
        want = snapkv_scores(q, k, size, options)[head]
        np.testing.assert_allclose(got[head, : 60 - size], want, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("options", ALL[1:], ids=lambda o: f"{o.policy}-{o.safeguard}")
def test_query_agnostic_methods_ignore_the_last_queries(options: Options):
    q, k = queries_and_keys(96)
    before = selected(options, q, k)
    q[:, -8:] = -q[:, -8:]
    is_same = all(map(np.array_equal, before, selected(options, q, k)))
    assert is_same == make_method(KVConfig(**asdict(options))).is_query_agnostic


def test_which_policies_may_compress_a_shared_prefix():
    """Those whose choice does not depend on how the prompt ends."""
    assert query_agnostic_policies() == (
        "full",
        "streaming_llm",
        "expected_attention",
        "keydiff",
        "knorm",
        "kvzip",
        "kvzip_plus",
        "duo_attention",
        "retrieval_keydiff",
    )
    for streaming, expected in (("recent", True), ("snapkv", False)):
        config = KVConfig("duo_attention", ratio=0.5, streaming=streaming)
        assert make_method(config).is_query_agnostic == expected


def test_equal_scores_go_to_the_earlier_token_and_the_lower_head():
    """Constant keys: every score in a head is the same, up to the last few under the pool."""
    q = np.zeros((HEADS * GROUP, 64, WIDTH), np.float32)
    k = np.ones((HEADS, 64, WIDTH), np.float32)
    for options in (scored("snapkv", budget=24), *ADA):
        got = selected(options, q, k)
        for head, want in enumerate(kept_positions(q, k, options)):
            np.testing.assert_array_equal(got[head], want)


def test_an_unknown_policy_is_refused_with_the_known_names():
    with pytest.raises(
        ValueError, match=f"unknown kv_policy 'h2o': use one of {', '.join(POLICIES)}"
    ):
        make_method(KVConfig("h2o", budget=64))


@pytest.mark.parametrize("policy", ["snapkv", "ada_snapkv"])
def test_a_budget_below_the_window(policy: str):
    with pytest.raises(
        ValueError,
        match="kv_budget 16 is smaller than the window 32: raise kv_budget or lower kv_window",
    ):
        make_method(KVConfig(policy, budget=16))
    make_method(KVConfig(policy, budget=16, window=16))
    make_method(KVConfig("streaming_llm", budget=16))  # has no window


@pytest.mark.parametrize("options", ALL, ids=lambda o: f"{o.policy}-{o.safeguard}")
def test_methods_are_values(options: Options):
    """Methods are static arguments of the prefill: equal options share one program."""
    one, other = (make_method(KVConfig(**asdict(options))) for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)
