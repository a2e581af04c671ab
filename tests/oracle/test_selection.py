"""The selections of tiny cases, worked out by hand."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest

from tests.oracle.selection import (
    Options,
    blended_quotas,
    kept_positions,
    pool,
    ranking,
    reserved_positions,
    snapkv_scores,
)


def make_qk(weights: Sequence[Sequence[float]], w: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Heads of width 1 whose every query attends to key s in proportion to weights[head][s]."""
    k = np.log(np.array(weights))[:, :, None]
    return np.ones_like(k), k


def kept(weights: Sequence[Sequence[float]], **options) -> list[list[int]]:
    q, k = make_qk(weights)
    defaults = {"policy": "snapkv", "window": 1, "kernel": 1}
    return [head.tolist() for head in kept_positions(q, k, Options(**defaults | options))]


def test_ranking_prefers_the_lower_index_of_equal_scores():
    assert ranking(np.array([1.0, 3.0, 3.0, 1.0, 2.0])).tolist() == [1, 2, 4, 0, 3]


def test_pools_at_the_ends():
    row = np.array([4.0, 0, 2, 6])
    np.testing.assert_allclose(pool(row, "max", 3), [4, 4, 6, 6])
    np.testing.assert_allclose(pool(row, "avg", 3), [4 / 3, 2, 8 / 3, 8 / 3])


def test_scores_are_means_of_causal_probabilities_outside_the_window():
    # Weights 1 2 | 3 2: the first window query sees 1 2 3, the second all four.
    q, k = make_qk([[1, 2, 3, 2]])
    scores = snapkv_scores(q, k, 2, Options("snapkv", budget=3, kernel=1))
    np.testing.assert_allclose(scores, [[(1 / 6 + 1 / 8) / 2, (2 / 6 + 2 / 8) / 2]])


def test_the_order_of_pooling_and_mean_matters_for_max():
    # Two query heads of one KV head, key weights 1 1 1: they differ by their queries' sign.
    k = np.log(np.array([[4.0, 1, 1, 1]]))[:, :, None]
    q = np.concatenate([np.ones((1, 4, 1)), -np.ones((1, 4, 1))])
    p, m = np.array([4, 1, 1]) / 7, np.array([1 / 4, 1, 1]) / (13 / 4)
    late = snapkv_scores(q, k, 1, Options("snapkv", budget=2, kernel=3))
    np.testing.assert_allclose(late[0], pool((p + m) / 2, "max", 3))
    early = snapkv_scores(q, k, 1, Options("snapkv", budget=2, kernel=3, pool_first=True))
    np.testing.assert_allclose(early[0], (pool(p, "max", 3) + pool(m, "max", 3)) / 2)
    assert early[0, 0] > late[0, 0] + 0.01


WEIGHTS = [[1, 9, 1, 8, 1], [1, 1, 2, 1, 1]]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"budget": 5}, [[0, 1, 2, 3, 4]] * 2),
        ({"budget": 99}, [[0, 1, 2, 3, 4]] * 2),
        ({"budget": 3}, [[1, 3, 4], [0, 2, 4]]),
        ({"ratio": 0.5}, [[1, 4], [2, 4]]),  # int(5 * 0.5) = 2
        ({"ratio": 0.9}, [[4], [4]]),  # max(1, int(0.5))
        ({"budget": 2, "window": 3}, [[3, 4], [3, 4]]),  # the window shrinks to the budget
        ({"budget": 3, "window": 2}, [[1, 3, 4], [2, 3, 4]]),
        ({"policy": "full"}, [[0, 1, 2, 3, 4]] * 2),
    ],
)
def test_uniform(options, expected):
    assert kept(WEIGHTS, **options) == expected


@pytest.mark.parametrize(
    ("budget", "expected"),
    [(1, [0]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (6, [0, 1, 2, 3, 8, 9]), (10, list(range(10)))],
)
def test_streaming(budget, expected):
    assert kept([[1.0] * 10], policy="streaming_llm", budget=budget) == [expected]


def test_pooling_keeps_the_neighbours_of_a_peak():
    assert kept([[1, 1, 1, 9, 1, 1, 1]], budget=4, kernel=3) == [[2, 3, 4, 6]]


def test_blend_gives_heads_their_share_of_the_top_above_a_floor():
    scores = np.array([[0.5, 0.4, 0.3, 0.2, 0.0], [0.25, 0.1, 0.1, 0.1, 0.1]])
    # The top 2*2 are 0.5 0.4 0.3 and 0.25: shares 3 and 1.
    assert blended_quotas(scores, 2, 0.0) == [3, 1]
    # (1 - 0.5) * 3 + floor(1.0) = 2.5 and 1.5: both round to the even 2.
    assert blended_quotas(scores, 2, 0.5) == [2, 2]
    assert blended_quotas(scores, 2, 1.0) == [2, 2]
    # floor(0.4 * 2) = 0, so the total falls below the budget: 1.8 and 0.6.
    assert blended_quotas(scores, 2, 0.4) == [2, 1]


def test_quotas_are_exact_in_the_decimals_of_alpha():
    scores = np.stack([np.full(200, 0.5), np.full(200, 0.1)])
    assert blended_quotas(scores[:1], 15, 0.9) == [14]  # 1.5 + floor(13.5), to the even number
    assert blended_quotas(scores[:1], 100, 0.29) == [100]  # 71 + 29
    assert blended_quotas(scores, 50, 0.29) == [85, 14]  # 71 + 14, 0 + floor(14.5)


def test_blend_keeps_each_head_its_quota_and_the_window():
    options = {"policy": "ada_snapkv", "safeguard": "blend", "budget": 3}
    # Probabilities before the window: 1 9 1 8 of 20, and 1 1 2 1 of 6. c = 2, top four: 9/20,
    # 8/20, 2/6, then 1/6 at positions 0, 1, 3 of head 1, of which position 0 wins.
    assert kept(WEIGHTS, alpha_safeguard=0.0, **options) == [[1, 3, 4], [0, 2, 4]]
    flat = [[1, 9, 1, 8, 1], [1, 1, 1, 1, 100]]
    assert kept(flat, alpha_safeguard=0.0, **options) == [[0, 1, 2, 3, 4], [4]]
    # alpha 1/2: (1 - alpha) * 4 + floor(1.0) = 3, and 0 + 1.
    assert kept(flat, alpha_safeguard=0.5, **options) == [[0, 1, 3, 4], [0, 4]]


def test_reserve_counts_the_window_in_the_floor():
    scores = np.array([[0.9, 0.8, 0.7, 0.6], [0.1, 0.2, 0.3, 0.05]])
    # w = 1, n = 3, T = 5: six in all. int(0.2 * 3) = 0, so one each, the window; then the top.
    one = reserved_positions(scores, 1, 3, 0.2)
    assert [head.tolist() for head in one] == [[0, 1, 2, 3, 4], [4]]
    # int(0.7 * 3) = 2 each: the window and the head's best; two more go to head 0.
    two = reserved_positions(scores, 1, 3, 0.7)
    assert [head.tolist() for head in two] == [[0, 1, 2, 4], [2, 4]]
    full = reserved_positions(scores, 1, 3, 1.0)
    assert [head.tolist() for head in full] == [[0, 1, 4], [1, 2, 4]]


def test_reserve_breaks_ties_by_head_then_position():
    kept_heads = reserved_positions(np.full((2, 3), 0.1), 1, 2, 0.2)
    assert [head.tolist() for head in kept_heads] == [[0, 1, 3], [3]]


@pytest.mark.parametrize("floor", ["blend", "reserve"])
@pytest.mark.parametrize("alpha", [0.0, 0.2, 1.0])
def test_random_selections_are_sorted_hold_the_window_and_meet_the_budget(floor, alpha):
    rng = np.random.default_rng(0)
    q = rng.standard_normal((6, 50, 8), dtype=np.float32)
    k = rng.standard_normal((3, 50, 8), dtype=np.float32)
    options = Options("ada_snapkv", budget=20, window=8, safeguard=floor, alpha_safeguard=alpha)
    heads = kept_positions(q, k, options)
    for positions in heads:
        assert (np.diff(positions) > 0).all()
        assert set(range(42, 50)) <= set(positions.tolist())
    total = sum(map(len, heads))
    assert abs(total - 60) <= (0 if floor == "reserve" else 3)  # blend rounds head by head
    if alpha == 1.0:
        uniform = kept_positions(q, k, dataclasses.replace(options, policy="snapkv"))
        assert all(map(np.array_equal, heads, uniform))
