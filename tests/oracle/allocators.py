"""How the budgets of a layer's heads, or of the whole model, become kept positions, in plain NumPy.

`scores` has one row for each KV head; +inf marks protected tokens. A budget n counts protected
tokens, and a head whose budget is at least T keeps the whole prompt. Rankings are stable and
descending: among equal scores the lower layer, then the lower head, then the earlier position wins.
"""

from collections.abc import Sequence

import numpy as np

from tests.oracle.selection import blended_quotas, exact_floor, ranking, top

Positions = list[np.ndarray]
"""The kept positions of each head, ascending."""


def uniform(scores: np.ndarray, n: Sequence[int]) -> Positions:
    """Each head keeps its own best tokens."""
    return [top(row, budget) for row, budget in zip(scores, n, strict=True)]


def ada_blend(scores: np.ndarray, n: Sequence[int], alpha: float) -> Positions:
    """Ada-KV as first published: blended quotas of the tokens that are not protected."""
    protected = [np.flatnonzero(np.isinf(row)) for row in scores]
    free = [np.flatnonzero(np.isfinite(row)) for row in scores]
    rest = [budget - len(own) for budget, own in zip(n, protected, strict=True)]
    rows = [row[own] for row, own in zip(scores, free, strict=True)]
    quotas = blended_quotas(rows, rest, alpha)
    chosen = [
        np.sort(np.r_[kept, own[top(row, quota)]])
        for kept, own, row, quota in zip(protected, free, rows, quotas, strict=True)
    ]
    return _whole_prompts(chosen, n, scores.shape[1])


def ada_reserve(scores: np.ndarray, n: Sequence[int], alpha: float) -> Positions:
    """Ada-KV as in kvpress: each head's best max(1, floor(alpha*n)), then the layer's best."""
    chosen = np.zeros(scores.shape, bool)
    for head, budget in enumerate(n):
        chosen[head, ranking(scores[head])[: max(1, exact_floor(alpha, budget))]] = True
    return _whole_prompts(_fill_up(scores, chosen, sum(n)), n, scores.shape[1])


def critical_ada(
    scores: np.ndarray, critical: np.ndarray, n: Sequence[int], alpha: float
) -> Positions:
    """CriticalKV within the budgets that `ada_reserve` gives the heads.

    A head of budget b keeps its best max(floor(b/2), max(1, floor(alpha*n))) tokens by `scores`,
    protected tokens first, and fills up with its best by `critical`; a protected token is +inf
    there too.
    """
    budgets = [len(own) for own in ada_reserve(scores, n, alpha)]
    kept = []
    for head, budget in enumerate(budgets):
        first = max(budget // 2, max(1, exact_floor(alpha, n[head])))
        chosen = np.zeros((1, scores.shape[1]), bool)
        chosen[0, ranking(scores[head])[:first]] = True
        kept += _fill_up(critical[head : head + 1], chosen, budget)
    return kept


def whole_model(scores: np.ndarray, num_kept: int) -> list[Positions]:
    """All heads of all layers compete for one budget, without a safeguard; scores [L, K, T]."""
    kept = np.zeros(scores.shape, bool)
    kept.flat[ranking(scores.ravel())[:num_kept]] = True
    return [[np.flatnonzero(head) for head in layer] for layer in kept]


def duo_budgets(
    head_scores: np.ndarray, T: int, total: int, num_sinks: int = 8, recent: int = 32
) -> np.ndarray:
    """Returns budgets [L, K] that sum to `total`: the best heads keep the prompt whole.

    After DuoAttention (Xiao et al., 2025). Every head keeps its sinks and recent tokens. In the
    order of `head_scores` [L, K], heads are then filled up to T; the last of them takes what is
    left.
    """
    base = min(num_sinks + recent, T)
    budgets = np.full(head_scores.shape, base)
    left = total - budgets.sum()
    if left < 0:
        raise ValueError(f"{total} tokens do not cover {base} in each of {budgets.size} heads")
    for index in ranking(head_scores.ravel()):
        more = min(T - base, left)
        budgets.flat[index] += more
        left -= more
    return budgets


def budgets_by_scores(
    head_scores: np.ndarray, T: int, total: int, num_sinks: int, recent: int
) -> np.ndarray:
    """Returns budgets [L, K] in proportion to the square roots of the scores, rounded down.

    They lie between num_sinks + recent and T. Of all factors of proportion, the largest one is
    taken whose budgets fit into `total`; what is then left goes to the heads of the highest scores.
    """
    weights = np.sqrt(np.maximum(head_scores, 0))
    base = min(num_sinks + recent, T)
    budgets = np.full(weights.shape, base)
    for factor in np.sort(np.outer(1 / weights[weights > 0], np.arange(1, T + 1)), axis=None):
        # A little more than the factor at which one of the heads gains a token.
        larger = np.clip(np.floor(factor * (1 + 1e-12) * weights).astype(int), base, T)
        if larger.sum() > total:
            break
        budgets = larger
    left = total - budgets.sum()
    for index in ranking(head_scores.ravel()):
        more = max(0, min(T - budgets.flat[index], left))
        budgets.flat[index] += more
        left -= more
    return budgets


def sinks_and_recent(n: int, T: int, num_sinks: int = 8) -> np.ndarray:
    """Returns the positions of the first `num_sinks` tokens and of the last n - num_sinks."""
    if n >= T:
        return np.arange(T)
    return np.r_[: min(num_sinks, n), T - max(n - num_sinks, 0) : T]


def _fill_up(scores: np.ndarray, chosen: np.ndarray, total: int) -> Positions:
    """Adds the best of all heads to those already chosen, up to `total`."""
    for index in ranking(scores.ravel()):
        if chosen.sum() >= total:
            break
        chosen.flat[index] = True
    return [np.flatnonzero(row) for row in chosen]


def _whole_prompts(kept: Positions, n: Sequence[int], T: int) -> Positions:
    """A head whose budget covers the prompt keeps all of it, whatever its share."""
    return [np.arange(T) if budget >= T else own for own, budget in zip(kept, n, strict=True)]
