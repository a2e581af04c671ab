"""Lower bounds on a layer, and mixed-integer programs that close what the search left open.

For one layer, HiGHS chooses devices and replicas or shares that minimise the load of the fullest
device, with at most C heads per device and at most `max_extra_replicas` extra replicas. Work is
limited by a number of nodes, not by time, so that the same input gives the same plan everywhere.
"""

from dataclasses import dataclass, field

import numpy as np

NODE_LIMIT = 1000
GAP = 1e-6
Values = float | np.ndarray


def lower_bounds(
    weights: np.ndarray, devices: int, slots: int, max_extra_replicas: int
) -> np.ndarray:
    """Bounds from below the load of each layer's fullest device, for equal and for free shares.

    The fullest device holds at least the mean, and at least the largest piece if each extra replica
    splits the largest piece. Without extra replicas it also holds at least the i+1 lightest of the
    i*P+1 heaviest heads, because i+1 of these share a device.

    Args:
        weights: [L, K] in descending order.

    Returns:
        [max_extra_replicas + 1, L]: entry e is for at most e extra replicas.
    """
    num_layers, num_heads = weights.shape
    pieces = np.ones(weights.shape, int)
    rows = np.arange(num_layers)
    mean = weights.sum(1) / devices
    bounds = [np.maximum(mean, _meeting(weights, devices))]
    for extra in range(1, max_extra_replicas + 1):
        largest = (weights / pieces).argmax(1)
        if num_heads + extra <= slots * devices:
            pieces[rows, largest] += pieces[rows, largest] < devices
        bounds.append(np.maximum(mean, (weights / pieces).max(1)))
    bounds[0] = np.maximum(bounds[0], weights[:, 0])
    return np.stack(bounds)


def _meeting(weights: np.ndarray, devices: int) -> np.ndarray:
    """The pigeonhole bound for heads that are not split, [L]."""
    bound = weights[:, 0]
    for together in range(2, -(-weights.shape[1] // devices) + 1):
        last = (together - 1) * devices + 1
        bound = np.maximum(bound, weights[:, last - together : last].sum(1))
    return bound


def num_equal_columns(
    weights: np.ndarray, start: np.ndarray, slots: int, max_extra_replicas: int
) -> int:
    """The number of triples that `equal_columns` gives."""
    devices = start.shape[1]
    least, spare = _replica_range(weights, start, slots, max_extra_replicas)
    return devices * int((np.minimum(devices, least + spare) - least + 1).sum()) * (spare >= 0)


def equal_columns(
    weights: np.ndarray, start: np.ndarray, slots: int, max_extra_replicas: int
) -> np.ndarray:
    """Returns the (head, replicas, device) triples that can beat `start` [K, P], int [n, 3].

    Each head needs enough replicas for its piece to be lighter than the fullest device of `start`.
    This leaves few extra replicas to distribute, and therefore few columns.
    """
    num_heads, devices = start.shape
    least, spare = _replica_range(weights, start, slots, max_extra_replicas)
    columns = [
        (head, count, device)
        for head in range(num_heads)
        for count in range(least[head], min(devices, least[head] + spare) + 1)
        for device in range(devices)
    ]
    return np.array(columns if spare >= 0 else [], int).reshape(-1, 3)


def _replica_range(
    weights: np.ndarray, start: np.ndarray, slots: int, max_extra_replicas: int
) -> tuple[np.ndarray, int]:
    """The fewest replicas of each head, int [K], and how many more there may be in all."""
    num_heads, devices = start.shape
    least = np.maximum(1, np.ceil(weights / (weights @ start).max() * (1 - 1e-9)).astype(int))
    return least, min(max_extra_replicas, slots * devices - num_heads) - int((least - 1).sum())


def solve_equal(
    weights: np.ndarray, start: np.ndarray, floor: float, slots: int, max_extra_replicas: int
) -> tuple[np.ndarray, float]:
    """Improves the shares `start` [K, P] of equally split heads, or proves that nothing can.

    Args:
        weights: [K] in descending order.
        floor: a known lower bound on the fullest device.

    Returns:
        shares [K, P] no worse than `start`, and a lower bound no worse than `floor`.
    """
    devices = start.shape[1]
    peak = float((weights @ start).max())
    columns = equal_columns(weights, start, slots, max_extra_replicas)
    if not len(columns):
        return start, peak
    head, count, device = columns.T
    choices, choice = np.unique(columns[:, :2], axis=0, return_inverse=True)
    choice = choice.reshape(-1)  # NumPy 2.0 gives it another axis
    n, m = len(columns), len(choices)
    each, option = np.arange(n), n + np.arange(m)
    program = Program(n + m + 1, n + m, floor / peak, 1.0)
    program.add(choices[:, 0], option, 1.0, low=1.0, high=1.0)
    program.add(
        np.concatenate([choice, np.arange(m)]),
        np.concatenate([each, option]),
        np.concatenate([np.ones(n), -choices[:, 1]]),
        low=0.0,
        high=0.0,
    )
    program.add(
        np.concatenate([each, each]),
        np.concatenate([each, option[choice]]),
        np.concatenate([np.ones(n), -np.ones(n)]),
        high=0.0,
    )
    program.add_loads(device, each, weights[head] / count / peak, devices)
    program.add(device, each, 1.0, high=slots)
    program.add(np.zeros(m, int), option, choices[:, 1] - 1.0, high=max_extra_replicas)
    # Devices are alike: let the heaviest head's replicas be on the first ones.
    program.high[each[(head == 0) & (device >= count)]] = 0.0
    values, bound = program.solve()
    shares = start
    if values is not None:
        shares = np.zeros_like(start)
        used = values[:n] > 0.5
        shares[head[used], device[used]] = 1.0 / count[used]
    return _no_worse(weights, start, shares, max(floor, bound * peak))


def solve_proportional(
    weights: np.ndarray, start: np.ndarray, floor: float, slots: int, max_extra_replicas: int
) -> tuple[np.ndarray, float]:
    """Like `solve_equal`, with free shares."""
    num_heads, devices = start.shape
    peak = float((weights @ start).max())
    n = num_heads * devices
    head, device = np.divmod(np.arange(n), devices)
    share, there = np.arange(n), n + np.arange(n)
    program = Program(2 * n + 1, 2 * n, floor / peak, 1.0)
    program.integral[share] = 0
    program.add(head, share, 1.0, low=1.0, high=1.0)
    program.add(
        np.concatenate([share, share]),
        np.concatenate([share, there]),
        np.concatenate([np.ones(n), -np.ones(n)]),
        high=0.0,
    )
    program.add(head, there, 1.0, low=np.ceil(weights / peak * (1 - 1e-9)), high=devices)
    program.add_loads(device, share, weights[head] / peak, devices)
    program.add(device, there, 1.0, high=slots)
    program.add_loads(device, share, weights[head] / peak, devices)
    program.add(device, there, 1.0, high=slots)
    program.add(np.zeros(n, int), there, 1.0, high=num_heads + max_extra_replicas)
    program.low[there[0]] = 1.0
    values, bound = program.solve()
    shares = start
    if values is not None:
        shares = np.where(values[there] > 0.5, values[share], 0.0).reshape(start.shape)
        shares[shares < 1e-9] = 0.0
        shares /= shares.sum(1, keepdims=True)
    return _no_worse(weights, start, shares, max(floor, bound * peak))


def _no_worse(
    weights: np.ndarray, start: np.ndarray, shares: np.ndarray, bound: float
) -> tuple[np.ndarray, float]:
    before, after = (weights @ start).max(), (weights @ shares).max()
    better = after < before * (1 - 1e-9)
    return (shares if better else start), float(min(bound, after, before))


@dataclass
class Program:
    """A mixed-integer program that minimises one variable, gathered block by block."""

    size: int
    objective: int
    floor: float
    ceiling: float
    entries: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)
    limits: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    count: int = 0

    def __post_init__(self) -> None:
        self.low, self.high = np.zeros(self.size), np.ones(self.size)
        self.integral = np.ones(self.size)
        self.low[self.objective], self.high[self.objective] = self.floor, self.ceiling
        self.integral[self.objective] = 0

    def add(
        self,
        row: np.ndarray,
        column: np.ndarray,
        value: Values,
        *,
        low: Values = -np.inf,
        high: Values = np.inf,
    ) -> None:
        """Adds the constraints low <= sum of value x variable[column] <= high of every row."""
        rows = int(row.max()) + 1
        self.entries.append((row + self.count, column, np.broadcast_to(value, row.shape)))
        self.limits.append((np.broadcast_to(low, rows), np.broadcast_to(high, rows)))
        self.count += rows

    def add_loads(
        self, device: np.ndarray, column: np.ndarray, load: np.ndarray, devices: int
    ) -> None:
        """No device is fuller than the objective says."""
        self.add(
            np.concatenate([device, np.arange(devices)]),
            np.concatenate([column, np.full(devices, self.objective)]),
            np.concatenate([load, -np.ones(devices)]),
            high=0.0,
        )

    def solve(self) -> tuple[np.ndarray | None, float]:
        """The best values found, if any, and the proven bound on the objective.

        Infeasible means that nothing lies below the ceiling, which is then the bound.
        """
        # Importing SciPy takes long, and most plans need no program.
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import coo_array

        row, column, value = (np.concatenate(part) for part in zip(*self.entries, strict=True))
        indices = row.astype(np.int32), column.astype(np.int32)  # SciPy 1.14 takes no others
        matrix = coo_array((value, indices), shape=(self.count, self.size)).tocsr()
        low, high = (np.concatenate(part) for part in zip(*self.limits, strict=True))
        objective = np.zeros(self.size)
        objective[self.objective] = 1.0
        result = milp(
            objective,
            integrality=self.integral,
            bounds=Bounds(self.low, self.high),  # pyright: ignore[reportArgumentType]
            constraints=LinearConstraint(matrix, low, high),  # pyright: ignore[reportArgumentType]
            options={"node_limit": NODE_LIMIT, "mip_rel_gap": GAP},
        )
        if result.status == 2:
            return None, self.ceiling
        bound = result.mip_dual_bound
        return result.x, self.floor if bound is None else max(self.floor, float(bound))
