"""Simulates serving with a plan and the router, to measure the balance of devices over time."""

from dataclasses import dataclass

import numpy as np

from fairkv_jax.plan.plan import Plan
from fairkv_jax.plan.route import route, route_beyond, row_counts


@dataclass(frozen=True)
class Workload:
    """Requests in the order of their arrival.

    >>> import numpy as np
    >>> from fairkv_jax.plan import Workload
    >>> lengths = np.array([[[900, 100]], [[700, 300]]])  # [R, L, K]
    >>> workload = Workload(lengths, arrivals=np.array([0, 3]), new_tokens=np.array([16, 16]))
    >>> drawn = Workload.drawn(lengths, requests=32, rate=1, new_tokens=20)
    >>> drawn.lengths.shape
    (32, 1, 2)

    Raises:
        ValueError: the arrays' sizes differ, or a request generates no token.
    """

    lengths: np.ndarray
    """[R, L, K] cached tokens of each request after its prefill."""
    arrivals: np.ndarray
    """int [R], the decode step in which a request may join the batch, ascending."""
    new_tokens: np.ndarray
    """int [R], at least 1: decode steps of a request; each adds one cached token per head."""

    def __post_init__(self) -> None:
        count = len(self.lengths)
        if self.lengths.ndim != 3 or not count:
            raise ValueError(
                f"lengths must have the shape [requests, layers, heads], got {self.lengths.shape}"
            )
        if self.arrivals.shape != (count,) or self.new_tokens.shape != (count,):
            raise ValueError(
                f"arrivals and new_tokens must have the shape [{count}], as there are {count} "
                f"requests, got {self.arrivals.shape} and {self.new_tokens.shape}"
            )
        if (np.diff(self.arrivals) < 0).any() or (self.new_tokens < 1).any():
            raise ValueError("arrivals must be in ascending order and new_tokens at least 1")

    @classmethod
    def drawn(
        cls, samples: np.ndarray, requests: int, *, rate: float, new_tokens: int, seed: int = 0
    ) -> "Workload":
        """Draws requests from measured lengths [prompts, L, K].

        Requests arrive as a Poisson process with `rate` requests per step. The number of tokens
        that they generate is exponentially distributed with the mean `new_tokens`.
        """
        rng = np.random.default_rng(seed)
        arrivals = np.floor(np.cumsum(rng.exponential(1 / rate, requests))).astype(int)
        stays = 1 + rng.exponential(new_tokens, requests).astype(int)
        return cls(samples[rng.integers(len(samples), size=requests)], arrivals, stays)


@dataclass(frozen=True)
class Trace:
    """Figures of every simulated decode step that had rows."""

    utilization: np.ndarray
    """[steps] busy time divided by elapsed time in attention, as in a plan."""
    token_balance: np.ndarray
    """[steps] mean cached tokens per device divided by those of each layer's fullest device: the
    utilization if weights cost nothing."""
    rows: np.ndarray
    """[steps] rows in the batch."""
    seconds: np.ndarray
    """[steps] time of attention."""
    fullest_over_mean: np.ndarray
    """[steps] cached tokens on the fullest device divided by the mean, summed over layers."""

    @property
    def mean_utilization(self) -> float:
        """Mean utilization, weighted by time."""
        return float(np.average(self.utilization, weights=self.seconds))

    @property
    def mean_token_balance(self) -> float:
        """Mean token balance, weighted by time."""
        return float(np.average(self.token_balance, weights=self.seconds))


def simulate(plan: Plan, workload: Workload, batch: int, *, routed: bool = True) -> Trace:
    """Simulates the whole workload with at most `batch` concurrent rows.

    A free row goes to the request that arrived first. With `routed`, `route` selects the replicas
    of a request when it joins the batch. Otherwise, the plan's shares assign the rows to replicas
    by row number, whatever their lengths.

    >>> import numpy as np
    >>> from fairkv_jax.plan import CostModel, Profile, Workload, make_plan, simulate
    >>> profile = Profile("toy", "ada_snapkv", budget=300, tokens=[[900, 100, 100, 100]])
    >>> workload = Workload.drawn(np.array([profile.array]), 32, rate=1, new_tokens=20)
    >>> cost = CostModel.tokens_only(batch=8)
    >>> for strategy in ("static", "fair_copying"):
    ...     plan = make_plan(profile, 2, strategy, cost=cost)
    ...     trace = simulate(plan, workload, batch=8)  # a Trace
    ...     print(f"{strategy:12} {trace.mean_utilization:.2f}")
    static       0.61
    fair_copying 0.93
    """
    replicas, fixed = plan.replicas(), _fixed_owners(plan, batch)
    num_layers, num_heads, devices = replicas.shape
    if workload.lengths.shape[1:] != (num_layers, num_heads):
        raise ValueError(
            f"the workload's lengths have {workload.lengths.shape[1:]} layers and heads, but the "
            f"plan has {(num_layers, num_heads)}"
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


@dataclass(frozen=True)
class SharedDocument:
    """Rows that begin with the same cached document, as the devices hold them."""

    utilization: float
    """As in a plan."""
    seconds: float
    """Time of attention in one step."""
    copied: float
    """Tokens of copied heads, as a fraction of the document's."""


def simulate_document(
    plan: Plan, lengths: np.ndarray, rows: int, new_tokens: int, *, copies: bool = True
) -> SharedDocument:
    """Simulates rows that join one after the other and share a document's pages.

    The document [L, K] is placed as a first row is. With `copies`, its heads are copied to other
    replicas as the engine does, see `route_beyond`; otherwise, every row is served where the
    document lies. Each row holds `new_tokens` more per head.

    >>> from fairkv_jax.plan import CostModel, Profile, make_plan, simulate_document
    >>> profile = Profile("toy", "ada_snapkv", budget=300, tokens=[[900, 100, 100, 100]])
    >>> plan = make_plan(profile, 2, cost=CostModel.tokens_only(batch=8))
    >>> for copies in (False, True):  # a SharedDocument each
    ...     found = simulate_document(plan, profile.array, rows=8, new_tokens=20, copies=copies)
    ...     print(f"{found.utilization:.2f}, copied {found.copied:.2f} of the document")
    0.62, copied 0.00 of the document
    1.00, copied 0.83 of the document
    """
    replicas = plan.replicas()
    num_layers, num_heads, devices = replicas.shape
    if lengths.shape != (num_layers, num_heads) or rows < 1:
        raise ValueError(
            f"a document {lengths.shape} and {rows} rows: the plan has {(num_layers, num_heads)} "
            "layers and heads, and there must be a row"
        )
    load = np.zeros((num_layers, devices))
    owner = route(replicas, lengths, load)
    holders = owner[..., None] == np.arange(devices)
    layers = np.arange(num_layers)[:, None]
    for _ in range(rows):
        owner = route_beyond(replicas if copies else holders, holders, lengths, load)
        holders |= owner[..., None] == np.arange(devices)
        np.add.at(load, (layers, owner), lengths + new_tokens)
    utilization, _, _, seconds, _ = _measure(plan, load, rows)
    held = (holders.sum(-1) * lengths).sum()
    return SharedDocument(utilization, seconds, float(held / lengths.sum() - 1))


def _measure(plan: Plan, load: np.ndarray, rows: int) -> tuple[float, float, int, float, float]:
    """Returns the figures of a `Trace` for one step with `load` [L, P] cached tokens."""
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
    """Returns the devices [batch, L, K] that the plan's shares assign to rows by their number."""
    ends = row_counts(plan.shares(), batch).cumsum(-1)
    return (np.arange(batch)[:, None, None, None] >= ends).sum(-1)
