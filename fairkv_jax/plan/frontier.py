"""The best placement for every number of copies, over the numbers of slots that may pay."""

from dataclasses import dataclass

import numpy as np

from fairkv_jax.plan.labels import balance_labels
from fairkv_jax.plan.objective import Objective
from fairkv_jax.plan.pack import tolerance
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

    def lower_bound(self, copies: int, batch: int) -> float:
        """Attention seconds that no plan with at most so many copies can be below."""
        bounds = [
            self.objective.attention_seconds(table.slots, table.bounds[copies].sum(), batch)
            for table in self.tables
        ]
        unseen = self.tables[-1].slots + 1
        if unseen <= min(self.most_slots, self.search.weights.shape[1]):
            lasting = self.search.lasting_bounds()[copies].sum()
            bounds.append(self.objective.attention_seconds(unseen, lasting, batch))
        return min(bounds)


def find_frontier(search: Search, objective: Objective, most_slots: int) -> Frontier:
    """Searches slot by slot until more slots cannot pay, then refines what may still improve."""
    entries = range(search.max_extra_replicas + 1)
    lasting = search.lasting_bounds().sum(1)
    mean = float(search.weights.sum() / search.devices)
    tables: list[Table] = []
    best: list[Candidate] = []
    stale = 0
    worth = 1 - tolerance(search.weights.shape[1])
    for table in search.tables(most_slots):
        if tables:
            floors = [objective.token_seconds(table.slots, lasting[e], mean) for e in entries]
            if all(floors[e] >= best[e].token_seconds * worth for e in entries):
                break
            gained = (table.peaks < tables[-1].peaks * (1 - 1e-7)).any()
            stale = 0 if gained else stale + 1
            if stale == STALE:
                break
        found = [judge(search, objective, table, e) for e in entries]
        best = [_better(*pair) for pair in zip(best or found, found, strict=True)]
        tables.append(table)
    for e in entries:
        work = WORK * search.effort
        for index, table in enumerate(tables):
            floor = objective.token_seconds(table.slots, table.bounds[e].sum(), mean)
            if floor < best[e].token_seconds * BETTER:
                tables[index], work = search.refine(table, e, work)
                best[e] = _better(best[e], judge(search, objective, tables[index], e))
        if e:
            best[e] = _better(best[e - 1], best[e])
    return Frontier(search, objective, most_slots, tuple(best), tuple(tables))


def judge(search: Search, objective: Objective, table: Table, copies: int) -> Candidate:
    """One entry of a table under the objective; labels are balanced where memory counts."""
    shares = table.shares[copies]
    load = np.einsum("lk,lkp->lp", search.weights, shares)
    if objective.device_bytes is not None:
        labels = balance_labels(load)
        shares = relabel(shares, labels)
        load = np.einsum("lk,lkp->lp", search.weights, shares)
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
