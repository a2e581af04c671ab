"""The best placement for every number of copies, over the numbers of slots that may pay."""

from dataclasses import dataclass

import numpy as np

from fairkv_jax.plan.labels import balance_labels
from fairkv_jax.plan.objective import Objective
from fairkv_jax.plan.pack import MANY_HEADS, tolerance
from fairkv_jax.plan.search import WORK, Search, Table

BETTER = 1 - 1e-9
"""More copies, or more slots, are used only for a gain that is not rounding."""
STALE = 2
"""So many more slots in a row without any layer gaining end the search."""


@dataclass(frozen=True)
class Candidate:
    """Shares of a whole model, with what the objective makes of them."""

    token_seconds: float
    shares: np.ndarray
    """[L, K, P], heads in descending weight."""
    slots: int
    fullest_tokens: float
    """What the device that holds most, over all layers, holds of one row."""


@dataclass(frozen=True)
class Frontier:
    """The best candidate with at most e copies per layer, for every e.

    Each entry depends only on what at most e copies allow, so that a higher limit never costs.
    """

    search: Search
    objective: Objective
    most_slots: int
    best: tuple[Candidate, ...]
    tables: tuple[Table, ...]

    def within(self, limit: int) -> Candidate:
        """The best candidate with at most `limit` extra replicas per layer."""
        return self.best[min(limit, len(self.best) - 1)]

    def lower_bound(self, copies: int, batch: int) -> float:
        """Attention seconds that no plan with at most so many copies can be below."""
        bounds = [
            self.objective.attention_seconds(table.slots, self.search.bound(table, copies), batch)
            for table in self.tables
        ]
        unseen = self.tables[-1].slots + 1
        if unseen <= min(self.most_slots, self.search.weights.shape[1]):
            lasting = self.search.lasting_bounds()[copies]
            bounds.append(self.objective.attention_seconds(unseen, lasting, batch))
        return min(bounds)


def find_frontier(
    search: Search, objective: Objective, most_slots: int, limit: int | None = None
) -> Frontier:
    """Searches slot by slot until more slots cannot pay, then refines what may still improve.

    `limit` is the number of extra replicas per layer that will be asked for. The exact solver skips
    smaller numbers whose lower bound shows that they cannot beat the placement for `limit`.
    """
    lasting = search.lasting_bounds()
    mean = float(search.layer_weights.sum() / search.devices)
    tables: list[Table] = []
    best: list[Candidate] = []
    stale = 0
    worth = 1 - tolerance(search.weights.shape[1])
    for table in search.tables(most_slots):
        if tables:
            # The last entry stands for every higher limit too, which more slots make possible.
            floors = [
                objective.token_seconds(table.slots, lasting[e], mean)
                for e in [*range(len(best) - 1), -1]
            ]
            if all(f >= b.token_seconds * worth for f, b in zip(floors, best, strict=True)):
                break
        found = [judge(search, objective, table, e) for e in range(len(table.peaks))]
        best = best or found
        best += [best[-1]] * (len(found) - len(best))
        better = [_better(*pair) for pair in zip(best, found, strict=True)]
        if tables:
            if search.weights.shape[1] > MANY_HEADS:
                gained = any(new is not old for new, old in zip(better, best, strict=True))
            else:
                before = tables[-1].extended(len(table.peaks))
                gained = bool((table.peaks < before.peaks * (1 - 1e-7)).any())
            stale = 0 if gained else stale + 1
            if stale == STALE:
                break
        best = better
        tables.append(table)
    asked = len(best) - 1 if limit is None else min(limit, len(best) - 1)
    # From the top down: the better the asked entry is, the fewer entries below can improve it.
    for e in [*range(asked, len(best)), *range(asked - 1, -1, -1)]:
        work = WORK * search.effort
        for index, table in enumerate(tables):
            if e >= len(table.peaks):
                continue
            floor = objective.token_seconds(table.slots, search.bound(table, e), mean)
            if floor < min(best[e].token_seconds, best[max(e, asked)].token_seconds) * BETTER:
                tables[index], work = search.refine(table, e, work)
                best[e] = _better(best[e], judge(search, objective, tables[index], e))
    for e in range(1, len(best)):
        best[e] = _better(best[e - 1], best[e])
    return Frontier(search, objective, most_slots, tuple(best), tuple(tables))


def judge(search: Search, objective: Objective, table: Table, copies: int) -> Candidate:
    """One entry of a table under the objective; labels are balanced where memory counts."""
    shares = table.shares[copies][search.distinct]
    load = np.einsum("lk,lkp->lp", search.layer_weights, shares)
    if objective.device_bytes is not None:
        labels = balance_labels(load)
        shares = relabel(shares, labels)
        load = np.einsum("lk,lkp->lp", search.layer_weights, shares)
    slots = int((shares > 0).sum(1).max())
    fullest = float(load.sum(0).max())
    seconds = objective.token_seconds(slots, float(load.max(1).sum()), fullest)
    return Candidate(seconds, shares, slots, fullest)


def relabel(shares: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Shares [L, K, P] in which device p of layer l has become device labels[l, p]."""
    moved = np.empty_like(shares)
    np.put_along_axis(moved, np.broadcast_to(labels[:, None, :], shares.shape), shares, 2)
    return moved


def _better(first: Candidate, second: Candidate) -> Candidate:
    """The cheaper one; the first, which has fewer slots or copies, unless that is a real gain."""
    return second if second.token_seconds < first.token_seconds * BETTER else first
