"""The allocations of tiny cases, worked out by hand."""

import numpy as np
import pytest

from tests.oracle.allocators import (
    ada_blend,
    ada_reserve,
    critical_ada,
    duo_budgets,
    sinks_and_recent,
    uniform,
    whole_model,
)

INF = np.inf
SCORES = np.array([[INF, 0.9, 0.8, 0.7, 0.6], [INF, 0.1, 0.2, 0.3, 0.05]])


def lists(kept) -> list[list[int]]:
    return [head.tolist() for head in kept]


def test_uniform_takes_protected_tokens_first():
    assert lists(uniform(SCORES, [3, 2])) == [[0, 1, 2], [0, 3]]


def test_reserve_counts_protected_tokens():
    assert lists(ada_reserve(SCORES, [3, 3], 0.2)) == [[0, 1, 2, 3, 4], [0]]
    assert lists(ada_reserve(SCORES, [3, 3], 0.7)) == [[0, 1, 2, 3], [0, 3]]
    assert lists(ada_reserve(SCORES, [3, 3], 1.0)) == [[0, 1, 2], [0, 2, 3]]
    # The second head keeps its prompt whole, beside what the first wins of the eight.
    assert lists(ada_reserve(SCORES, [3, 5], 0.2)) == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]


def test_blend_spreads_what_is_not_protected():
    # c = 2 each, and all four of the layer's best are head 0's: 0.5 * 4 + 1 and 0 + 1.
    assert lists(ada_blend(SCORES, [3, 3], 0.5)) == [[0, 1, 2, 3], [0, 3]]
    assert lists(ada_blend(SCORES, [3, 3], 1.0)) == [[0, 1, 2], [0, 2, 3]]


def test_critical_ada_takes_half_by_the_first_ranking():
    second = np.array([[INF, 1, 2, 3, 4], [INF, 4, 3, 2, 1]])
    # Budgets 5 and 1: everything, and the protected token alone.
    assert lists(critical_ada(SCORES, second, [3, 3], 0.2)) == [[0, 1, 2, 3, 4], [0]]
    # Budgets 4 and 2. Head 0: max(4 // 2, int(2.1)) = 2 by score, 0 and 1, then 4 and 3 by the
    # second ranking. Head 1: max(1, 2) = 2 by score, so the second ranking decides nothing.
    assert lists(critical_ada(SCORES, second, [3, 3], 0.7)) == [[0, 1, 3, 4], [0, 3]]
    # Budgets 3 and 3 of a layer whose heads are alike; int(0.34 * 3) = 1, 3 // 2 = 1: the rest is
    # the second ranking's.
    alike = np.array([SCORES[0], SCORES[0]])
    assert lists(critical_ada(alike, second, [3, 3], 0.34)) == [[0, 3, 4], [0, 1, 2]]


def test_the_whole_model_has_one_budget_and_breaks_ties_by_layer_head_position():
    scores = np.array([[[0.5, 0.1], [0.5, 0.9]], [[0.5, 0.0], [0.6, 0.5]]])
    kept = whole_model(scores, 4)
    assert [lists(layer) for layer in kept] == [[[0], [0, 1]], [[], [0]]]


def test_duo_budgets_fill_the_best_heads():
    scores = np.array([[0.1, 0.9], [0.5, 0.3]])
    # 4 heads, T = 100, 40 in each: 160 of 250; 60 more for the best, 30 for the next.
    assert duo_budgets(scores, 100, 250).tolist() == [[40, 100], [70, 40]]
    assert duo_budgets(scores, 30, 120).tolist() == [[30, 30], [30, 30]]
    with pytest.raises(ValueError, match="159 tokens do not cover 40 in each of 4 heads"):
        duo_budgets(scores, 100, 159)
    assert sinks_and_recent(12, 100).tolist() == [*range(8), 96, 97, 98, 99]
    assert sinks_and_recent(100, 100).tolist() == list(range(100))
