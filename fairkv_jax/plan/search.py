"""The best placements found for each number of slots and copies, with what bounds them.

The step time splits: with C slots it is L*C*a plus b*batch times the sum of each layer's fullest
device, so that for a given C every layer is a problem of its own, and only C ties them together.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fairkv_jax.plan.bounds import lower_bounds
from fairkv_jax.plan.choices import choice_bounds, replica_choices
from fairkv_jax.plan.equal import equal_splits, try_choices
from fairkv_jax.plan.exact import num_equal_columns, solve_equal, solve_proportional
from fairkv_jax.plan.pack import tolerance
from fairkv_jax.plan.proportional import proportional_splits

CLOSED = 1e-6
"""A relative gap below which a layer counts as solved."""
WORK = 300
LARGEST = 120
"""Per unit of effort: variables handed to HiGHS per number of copies, in all and for one layer.
A program of 100 takes about 0.3 s, one of 400 some seconds."""


@dataclass(frozen=True)
class Table:
    """Everything known with C slots: entry e of the leading axes is for at most e copies."""

    slots: int
    shares: np.ndarray
    """[E, U, K, P], heads in descending weight."""
    bounds: np.ndarray
    """[E, U] what no placement's fullest device can be below."""
    peaks: np.ndarray
    """[E, U] the fullest device of `shares`."""

    def extended(self, entries: int) -> "Table":
        """The table with its last entry repeated: these slots hold no more extra replicas."""
        entry = np.minimum(np.arange(entries), len(self.peaks) - 1)
        return Table(self.slots, self.shares[entry], self.bounds[entry], self.peaks[entry])


@dataclass(frozen=True)
class Search:
    """The problem without costs: weights, devices and the limits that shape the placements."""

    weights: np.ndarray
    """[U, K] the distinct layers, each in descending order."""
    distinct: np.ndarray
    """int [L], which row of `weights` each layer is."""
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
        """int [U], how many layers each row of `weights` stands for."""
        return np.bincount(self.distinct, minlength=len(self.weights))

    @property
    def least_slots(self) -> int:
        """Fewer slots cannot hold every head once."""
        return -(-self.weights.shape[1] // self.devices)

    def extra_replicas(self, slots: int) -> int:
        """The most extra replicas that `slots` slots per device can hold within the limit."""
        return min(self.max_extra_replicas, slots * self.devices - self.weights.shape[1])

    def tables(self, most_slots: int) -> Iterator[Table]:
        """Tables of more and more slots, each at least as good as the one before."""
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

    def refine(self, table: Table, copies: int, work: int) -> tuple[Table, int]:
        """Hands the most open layers, at that number of copies, to HiGHS.

        Returns the better table, and what is left of `work`, in variables.
        """
        gaps = table.peaks[copies] - table.bounds[copies]
        shares, bounds = table.shares.copy(), table.bounds.copy()
        for layer in np.argsort(-gaps * self.layer_counts, kind="stable"):
            if gaps[layer] <= CLOSED * table.peaks[copies, layer]:
                continue
            weights, start = self.weights[layer], shares[copies, layer]
            size = 2 * start.size
            if self.row_split == "equal":
                size = num_equal_columns(weights, start, table.slots, copies)
            if size > min(work, LARGEST * self.effort):
                continue
            work -= size
            solve = solve_equal if self.row_split == "equal" else solve_proportional
            shares[copies, layer], bounds[copies, layer] = solve(
                weights, start, float(bounds[copies, layer]), table.slots, copies
            )
        shares = _carry_copies(shares, _peaks(self.weights, shares))
        return Table(table.slots, shares, bounds, _peaks(self.weights, shares)), work

    def _level(self, shares: np.ndarray, bounds: np.ndarray, slots: int) -> np.ndarray:
        """Frees the shares: levels the placements of whole heads and those of equal splits."""
        best, peaks = shares.copy(), _peaks(self.weights, shares)
        for whole in (True, False):
            starts = np.broadcast_to(shares[:1], shares.shape) if whole else shares
            extra, layer = np.nonzero(peaks > bounds * (1 + tolerance(shares.shape[2])))
            found = proportional_splits(self.weights[layer], starts[extra, layer], slots, extra)
            reached = np.einsum("nk,nkp->np", self.weights[layer], found).max(1)
            better = reached < peaks[extra, layer] * (1 - 1e-9)
            extra, layer = extra[better], layer[better]
            best[extra, layer], peaks[extra, layer] = found[better], reached[better]
        return _carry_copies(best, peaks)


def _peaks(weights: np.ndarray, shares: np.ndarray) -> np.ndarray:
    return np.einsum("lk,elkp->elp", weights, shares).max(2)


def _carry_copies(shares: np.ndarray, peaks: np.ndarray) -> np.ndarray:
    """Where more copies found something worse, keep what fewer copies found."""
    for extra in range(1, len(shares)):
        worse = peaks[extra] >= peaks[extra - 1] * (1 - 1e-12)
        shares[extra, worse], peaks[extra, worse] = (
            shares[extra - 1, worse],
            peaks[extra - 1, worse],
        )
    return shares


def _keep_better(table: Table, before: Table) -> Table:
    """What fewer slots hold fits into more slots too."""
    before = before.extended(len(table.peaks))
    better = table.peaks < before.peaks * (1 - 1e-12)
    shares = np.where(better[:, :, None, None], table.shares, before.shares)
    return Table(table.slots, shares, table.bounds, np.where(better, table.peaks, before.peaks))


def _raise_bounds(
    bounds: np.ndarray, choices: np.ndarray, floors: np.ndarray, all_slots: int
) -> np.ndarray:
    """With equal splits the bound is that of the best choice of replicas."""
    total = choices.sum(1)
    copies = total - choices.shape[1]
    raised = bounds.copy()
    for extra in range(min(len(bounds), int(copies.max()) + 1)):
        possible = (copies <= extra) & (total <= all_slots)
        raised[extra] = np.maximum(bounds[extra], floors[:, possible].min(1))
    return raised
