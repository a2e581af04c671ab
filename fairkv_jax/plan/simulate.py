"""Replays measured lengths through a plan and the router: how balanced is serving over time?"""

from dataclasses import dataclass

import numpy as np

from fairkv_jax.plan.plan import Plan
from fairkv_jax.plan.route import route, row_counts


@dataclass(frozen=True)
class Workload:
    """Requests in the order in which they come.

    Raises:
        ValueError: the arrays disagree, or a request generates nothing.
    """

    lengths: np.ndarray
    """[R, L, K] cached tokens of each request after its prefill."""
    arrivals: np.ndarray
    """int [R], the decode step before which a request may join, ascending."""
    new_tokens: np.ndarray
    """int [R], at least 1: decode steps that a request stays; each adds a token to every head."""

    def __post_init__(self) -> None:
        count = len(self.lengths)
        if self.lengths.ndim != 3 or not count:
            raise ValueError(
                f"lengths must have the shape [requests, layers, heads], got {self.lengths.shape}"
            )
        if self.arrivals.shape != (count,) or self.new_tokens.shape != (count,):
            raise ValueError(f"{count} requests need as many arrivals and new_tokens")
        if (np.diff(self.arrivals) < 0).any() or (self.new_tokens < 1).any():
            raise ValueError("arrivals must ascend and new_tokens be at least 1")

    @classmethod
    def drawn(
        cls, samples: np.ndarray, requests: int, *, rate: float, new_tokens: int, seed: int = 0
    ) -> "Workload":
        """Draws requests from measured lengths [prompts, L, K].

        They come as a Poisson process of `rate` a step; what they generate is exponential with
        the mean `new_tokens`.
        """
        rng = np.random.default_rng(seed)
        arrivals = np.floor(np.cumsum(rng.exponential(1 / rate, requests))).astype(int)
        stays = 1 + rng.exponential(new_tokens, requests).astype(int)
        return cls(samples[rng.integers(len(samples), size=requests)], arrivals, stays)


@dataclass(frozen=True)
class Trace:
    """What the simulation saw at each decode step that had rows."""

    utilization: np.ndarray
    """[steps] busy over elapsed time of attention, as in a plan."""
    token_balance: np.ndarray
    """[steps] cached tokens of all devices over P times the fullest's, layer by layer: what
    utilisation is where weights cost nothing."""
    rows: np.ndarray
    """[steps] rows in the batch."""
    seconds: np.ndarray
    """[steps] attention's part of the step."""
    fullest_over_mean: np.ndarray
    """[steps] memory: cached tokens on the fullest device over the mean device."""

    @property
    def mean_utilization(self) -> float:
        """Over the elapsed time."""
        return float(np.average(self.utilization, weights=self.seconds))

    @property
    def mean_token_balance(self) -> float:
        """Over the elapsed time."""
        return float(np.average(self.token_balance, weights=self.seconds))


def simulate(plan: Plan, workload: Workload, batch: int, *, routed: bool = True) -> Trace:
    """Runs the workload to its end with at most `batch` rows at a time.

    A free row is taken by the earliest request that has come. With `routed` each request's
    replicas are chosen by `route` when it joins; without, row r of the batch always goes to the
    replica that the plan's shares give it, whatever its lengths are.
    """
    replicas, fixed = plan.replicas(), _fixed_owners(plan, batch)
    num_layers, num_heads, devices = replicas.shape
    if workload.lengths.shape[1:] != (num_layers, num_heads):
        raise ValueError(
            f"the lengths are of {workload.lengths.shape[1:]} layers and heads, "
            f"the plan of {(num_layers, num_heads)}"
        )
    held = np.zeros((batch, num_layers, num_heads))
    owned = np.zeros((batch, num_layers, num_heads, devices), bool)
    left = np.zeros(batch, int)
    step, following, records = 0, 0, []
    while following < len(workload.arrivals) or left.any():
        if not left.any():
            step = max(step, int(workload.arrivals[following]))
        for row in np.flatnonzero(left == 0):
            if following == len(workload.arrivals) or workload.arrivals[following] > step:
                break
            lengths = workload.lengths[following]
            load = np.einsum("rlk,rlkp->lp", held, owned)
            owner = route(replicas, lengths, load) if routed else fixed[row]
            held[row], left[row] = lengths, workload.new_tokens[following]
            owned[row] = owner[..., None] == np.arange(devices)
            following += 1
        active = left > 0
        held[active] += 1
        records.append(_measure(plan, np.einsum("rlk,rlkp->lp", held, owned), int(active.sum())))
        left[active] -= 1
        held[left == 0] = 0
        step += 1
    return Trace(*(np.array(column) for column in zip(*records, strict=True)))


def _measure(plan: Plan, load: np.ndarray, rows: int) -> tuple[float, float, int, float, float]:
    """Utilisation, token balance, rows, seconds and memory balance at tokens `load` [L, P]."""
    cost, (num_layers, devices) = plan.cost, load.shape
    peak, total = load.max(1).sum(), load.sum()
    seconds = num_layers * plan.slots * cost.a_seconds + peak * cost.b_seconds_per_token
    num_replicas = num_layers * plan.num_heads + plan.num_extra_replicas
    busy = num_replicas * cost.a_seconds + total * cost.b_seconds_per_token
    held = load.sum(0)
    return (
        busy / devices / seconds,
        total / devices / peak,
        rows,
        seconds,
        held.max() / held.mean(),
    )


def _fixed_owners(plan: Plan, batch: int) -> np.ndarray:
    """Owners [batch, L, K] that follow the plan's shares by row number alone."""
    ends = row_counts(plan.shares(), batch).cumsum(-1)
    return (np.arange(batch)[:, None, None, None] >= ends).sum(-1)
