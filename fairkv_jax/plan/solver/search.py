"""Finds the best placement for every limit on replicas, over the numbers of slots that can pay.

The step time splits: with C slots per device it is L*C*a plus b*batch times the sum over layers of
the fullest device's tokens. For a given C every layer is therefore an independent problem.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fairkv_jax.plan.cost import Objective
from fairkv_jax.plan.solver.exact import (
    lower_bounds,
    num_equal_columns,
    solve_equal,
    solve_proportional,
)
from fairkv_jax.plan.solver.packing import (
    MANY_HEADS,
    choice_bounds,
    equal_splits,
    replica_choices,
    tolerance,
    try_choices,
)
from fairkv_jax.plan.solver.proportional import proportional_splits

CLOSED = 1e-6
"""Relative gap below which a layer counts as solved."""
WORK = 300
LARGEST = 120
"""Limits on the variables of HiGHS programs per unit of effort and limit on replicas: in total, and
for one layer. A program with 100 variables takes about 0.3 s, one with 400 several seconds."""
BETTER = 1 - 1e-9
"""More replicas or slots are used only if the gain exceeds rounding errors."""
STALE = 2
"""The search ends after this many consecutive slot counts without a gain, where slots cost time."""
MAX_PASSES = 20


@dataclass(frozen=True)
class Table:
    """The results for C slots; entry e of the leading axis allows at most e extra replicas."""

    slots: int
    shares: np.ndarray
    """[E, U, K, P], heads in descending weight."""
    bounds: np.ndarray
    """[E, U] lower bounds on the load of the fullest device."""
    peaks: np.ndarray
    """[E, U] the load of the fullest device under `shares`."""

    def extended(self, entries: int) -> "Table":
        """The table with its last entry repeated: these slots hold no more extra replicas."""
        entry = np.minimum(np.arange(entries), len(self.peaks) - 1)
        return Table(self.slots, self.shares[entry], self.bounds[entry], self.peaks[entry])


@dataclass(frozen=True)
class Search:
    """The placement problem without costs: weights, devices and limits."""

    weights: np.ndarray
    """[U, K] the distinct layers, each in descending order."""
    distinct: np.ndarray
    """int [L], the row of `weights` that holds each layer."""
    devices: int
    max_extra_replicas: int
    row_split: str
    effort: int = 1

    @property
    def layer_weights(self) -> np.ndarray:
        """[L, K] the weights of every layer."""
        return self.weights[self.distinct]

    @property
    def layer_counts(self) -> np.ndarray:
        """int [U], the number of layers that each row of `weights` represents."""
        return np.bincount(self.distinct, minlength=len(self.weights))

    @property
    def least_slots(self) -> int:
        """Minimum number of slots per device that hold every head once."""
        return -(-self.weights.shape[1] // self.devices)

    def extra_replicas(self, slots: int) -> int:
        """The most extra replicas that `slots` slots per device can hold within the limit."""
        return min(self.max_extra_replicas, slots * self.devices - self.weights.shape[1])

    def tables(self, most_slots: int) -> Iterator[Table]:
        """Yields tables for increasing numbers of slots, each at least as good as the previous."""
        heads = self.weights.shape[1]
        choices = replica_choices(heads, self.devices, self.max_extra_replicas)
        floors = choice_bounds(self.weights, choices, self.devices)
        before = None
        for slots in range(self.least_slots, min(most_slots, heads) + 1):
            extra = self.extra_replicas(slots)
            shares = equal_splits(self.weights, self.devices, slots, extra)
            bounds = lower_bounds(self.weights, self.devices, slots, extra)
            shares = try_choices(self.weights, shares, choices, floors, slots)
            if self.row_split == "equal":
                bounds = _raise_bounds(bounds, choices, floors, slots * self.devices)
            else:
                shares = self._level(shares, bounds, slots)
            table = Table(slots, shares, bounds, _peaks(self.weights, shares))
            before = table if before is None else _keep_better(table, before)
            yield before

    def lasting_bounds(self) -> np.ndarray:
        """[E] bounds on the sum over layers that hold for any number of slots."""
        num_heads = self.weights.shape[1]
        bounds = lower_bounds(self.weights, self.devices, num_heads, self.max_extra_replicas)
        return bounds @ self.layer_counts

    def bound(self, table: Table, limit: int) -> float:
        """The sum over layers of the table's bounds with at most `limit` extra replicas."""
        return float(table.bounds[min(limit, len(table.bounds) - 1)] @ self.layer_counts)

    def refine(self, table: Table, limit: int, work: int) -> tuple[Table, int]:
        """Hands the most open layers, at that number of limit, to HiGHS.

        Returns the better table, and what is left of `work`, in variables.
        """
        gaps = table.peaks[limit] - table.bounds[limit]
        shares, bounds = table.shares.copy(), table.bounds.copy()
        for layer in np.argsort(-gaps * self.layer_counts, kind="stable"):
            if gaps[layer] <= CLOSED * table.peaks[limit, layer]:
                continue
            weights, start = self.weights[layer], shares[limit, layer]
            size = 2 * start.size
            if self.row_split == "equal":
                size = num_equal_columns(weights, start, table.slots, limit)
            if size > min(work, LARGEST * self.effort):
                continue
            work -= size
            solve = solve_equal if self.row_split == "equal" else solve_proportional
            shares[limit, layer], bounds[limit, layer] = solve(
                weights, start, float(bounds[limit, layer]), table.slots, limit
            )
        shares = _carry_replicas(shares, _peaks(self.weights, shares))
        return Table(table.slots, shares, bounds, _peaks(self.weights, shares)), work

    def _level(self, shares: np.ndarray, bounds: np.ndarray, slots: int) -> np.ndarray:
        """Improves placements of whole heads and equal splits by making their shares free."""
        best, peaks = shares.copy(), _peaks(self.weights, shares)
        for whole in (True, False):
            starts = np.broadcast_to(shares[:1], shares.shape) if whole else shares
            extra, layer = np.nonzero(peaks > bounds * (1 + tolerance(shares.shape[2])))
            found = proportional_splits(self.weights[layer], starts[extra, layer], slots, extra)
            reached = np.einsum("nk,nkp->np", self.weights[layer], found).max(1)
            better = reached < peaks[extra, layer] * (1 - 1e-9)
            extra, layer = extra[better], layer[better]
            best[extra, layer], peaks[extra, layer] = found[better], reached[better]
        return _carry_replicas(best, peaks)


def _peaks(weights: np.ndarray, shares: np.ndarray) -> np.ndarray:
    return np.einsum("lk,elkp->elp", weights, shares).max(2)


def _carry_replicas(shares: np.ndarray, peaks: np.ndarray) -> np.ndarray:
    """Replaces an entry by the one below it where more extra replicas gave a worse result."""
    for extra in range(1, len(shares)):
        worse = peaks[extra] >= peaks[extra - 1] * (1 - 1e-12)
        shares[extra, worse], peaks[extra, worse] = (
            shares[extra - 1, worse],
            peaks[extra - 1, worse],
        )
    return shares


def _keep_better(table: Table, before: Table) -> Table:
    """Keeps the result for fewer slots where it is better: it fits into more slots as well."""
    before = before.extended(len(table.peaks))
    better = table.peaks < before.peaks * (1 - 1e-12)
    shares = np.where(better[:, :, None, None], table.shares, before.shares)
    return Table(table.slots, shares, table.bounds, np.where(better, table.peaks, before.peaks))


def _raise_bounds(
    bounds: np.ndarray, choices: np.ndarray, floors: np.ndarray, all_slots: int
) -> np.ndarray:
    """Raises the bounds to those of the best choice of replicas, which equal splits need."""
    total = choices.sum(1)
    extra = total - choices.shape[1]
    raised = bounds.copy()
    for limit in range(min(len(bounds), int(extra.max()) + 1)):
        possible = (extra <= limit) & (total <= all_slots)
        raised[limit] = np.maximum(bounds[limit], floors[:, possible].min(1))
    return raised


@dataclass(frozen=True)
class Candidate:
    """Shares of a whole model, with what the objective makes of them."""

    token_seconds: float
    shares: np.ndarray
    """[L, K, P], heads in descending weight."""
    slots: int
    fullest_tokens: float
    """Cached tokens of one row, over all layers, on the device that holds the most."""


@dataclass(frozen=True)
class Frontier:
    """The best candidate with at most e extra replicas per layer, for every e.

    Each entry depends only on results for at most e extra replicas, so a higher limit never makes a
    plan slower.
    """

    search: Search
    objective: Objective
    most_slots: int
    best: tuple[Candidate, ...]
    tables: tuple[Table, ...]

    def within(self, limit: int) -> Candidate:
        """The best candidate with at most `limit` extra replicas per layer."""
        return self.best[min(limit, len(self.best) - 1)]

    def lower_bound(self, limit: int, batch: int) -> float:
        """A lower bound on the attention seconds of plans with at most `limit` extra replicas."""
        bounds = [
            self.objective.attention_seconds(table.slots, self.search.bound(table, limit), batch)
            for table in self.tables
        ]
        unseen = self.tables[-1].slots + 1
        if unseen <= min(self.most_slots, self.search.weights.shape[1]):
            lasting = self.search.lasting_bounds()[limit]
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
    stale, is_small = 0, search.weights.shape[1] <= MANY_HEADS
    # Without a gain for long, more slots still help where a device is full of light heads.
    patience = most_slots if is_small and not objective.cost.a_seconds else STALE
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
            if not is_small:
                gained = any(new is not old for new, old in zip(better, best, strict=True))
            else:
                before = tables[-1].extended(len(table.peaks))
                gained = bool((table.peaks < before.peaks * (1 - 1e-7)).any())
            stale = 0 if gained else stale + 1
            if stale == patience:
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


def judge(search: Search, objective: Objective, table: Table, limit: int) -> Candidate:
    """One entry of a table under the objective; labels are balanced where memory counts."""
    shares = table.shares[limit][search.distinct]
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
    """The cheaper one; the first, which has fewer slots or limit, unless that is a real gain."""
    return second if second.token_seconds < first.token_seconds * BETTER else first


def balance_labels(load: np.ndarray) -> np.ndarray:
    """Permutes the devices of every layer so that no device is always the fullest.

    The step time sees only each layer's fullest device, so labels are free. The most uneven
    layers are placed first, heaviest device onto the lightest total; then each layer in turn is
    taken out and put back the same way until nothing improves.

    Args:
        load: [L, P] cached tokens of one row.

    Returns:
        labels: int [L, P]; what was device p of layer l becomes device labels[l, p].
    """
    num_layers, devices = load.shape
    labels = np.tile(np.arange(devices), (num_layers, 1))
    total = np.zeros(devices)
    for layer in np.argsort(load.min(1) - load.max(1), kind="stable"):
        labels[layer] = _opposite(load[layer], total)
        total[labels[layer]] += load[layer]
    for _ in range(MAX_PASSES):
        before = total.max()
        for layer in range(num_layers):
            rest = total.copy()
            rest[labels[layer]] -= load[layer]
            trial = _opposite(load[layer], rest)
            filled = rest.copy()
            filled[trial] += load[layer]
            if filled.max() < total.max() * (1 - 1e-12):
                labels[layer], total = trial, filled
        if total.max() >= before:
            break
    return labels


def _opposite(load: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Labels that put the heaviest of `load` [P] onto the lightest of `total` [P], and so on."""
    labels = np.empty(len(load), int)
    labels[np.argsort(-load, kind="stable")] = np.argsort(total, kind="stable")
    return labels
