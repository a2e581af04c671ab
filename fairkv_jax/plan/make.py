"""Makes a head plan: checks the arguments, runs the strategy, and computes the plan's cost."""

from dataclasses import replace
from typing import Any

import numpy as np

from fairkv_jax.plan.cost import HARDWARE, MAX_BATCH, MEMORY_UTILIZATION, CostModel, Objective
from fairkv_jax.plan.plan import Plan, Replica
from fairkv_jax.plan.profile import Profile
from fairkv_jax.plan.shape import find_shape
from fairkv_jax.plan.solver.search import Candidate, Search, balance_labels, find_frontier, relabel

STRATEGIES = ("static", "best_effort", "fair_copying")
ROW_SPLITS = ("equal", "proportional")


def make_plan(
    profile: Profile,
    num_devices: int,
    strategy: str = "fair_copying",
    *,
    row_split: str = "equal",
    max_extra_replicas: int | None = None,
    max_slots: int | None = None,
    device_bytes: float | None = None,
    objective: str = "latency",
    cost: CostModel | None = None,
    effort: int = 1,
) -> Plan:
    """Assigns the heads of every layer to devices so that decoding is fast.

    >>> from fairkv_jax.plan import Profile, make_plan
    >>> profile = Profile("toy", "ada_snapkv", budget=300, tokens=[[900, 100, 100, 100]])
    >>> for strategy in ("static", "best_effort", "fair_copying"):
    ...     plan = make_plan(profile, 2, strategy, row_split="proportional")
    ...     print(f"{strategy:12} {plan.utilization:.0%}")
    static       60%
    best_effort  67%
    fair_copying 100%

    Args:
        strategy: "static" (contiguous blocks), "best_effort" (no replicas) or "fair_copying".
        row_split: how the rows of a replicated head are divided among its replicas: "equal", or
            "proportional" to the free capacity of their devices.
        max_extra_replicas: maximum replicas per layer beyond one per head; by default only the
            slots limit them.
        max_slots: maximum heads per device in any layer.
        device_bytes: maximum bytes per device: weights, empty slots and cached tokens.
        objective: "latency", or "throughput" at the batch that `device_bytes` allows.
        cost: the cost model; by default `default_cost`, H100s with a batch that their memory holds.
        effort: the work of the exact solver; 0 uses heuristics only.

    Raises:
        ValueError: an argument is out of range, or a limit cannot be met; the message names the
            limit and the nearest feasible value.
    """
    limit = _check(profile, num_devices, strategy, row_split, max_extra_replicas, max_slots, effort)
    cost = default_cost(profile, num_devices) if cost is None else cost
    goal = Objective(cost, profile.num_layers, objective, device_bytes)
    batch, shares, bound, gain = _choose(
        profile, num_devices, strategy, row_split, limit, max_slots, goal, effort
    )
    return _describe(
        profile,
        shares,
        goal,
        batch,
        strategy=strategy,
        row_split=row_split,
        bound=bound,
        gain=gain,
    )


def _choose(
    profile: Profile,
    num_devices: int,
    strategy: str,
    row_split: str,
    limit: int,
    max_slots: int | None,
    goal: Objective,
    effort: int,
) -> tuple[int, np.ndarray, float, float]:
    """Returns the batch, the shares [L, K, P], the lower bound in seconds, and a relative gain.

    The gain is that of one more replica per layer. The search sorts the heads by descending weight,
    so that the result does not depend on their order.
    """
    order = np.argsort(-profile.array, axis=1, kind="stable")
    weights = np.take_along_axis(profile.array, order, 1)
    fixed = static_shares(profile.num_layers, profile.num_heads, num_devices)
    fixed = np.take_along_axis(fixed, order[:, :, None], 1)
    distinct, which = np.unique(weights, axis=0, return_inverse=True)
    most = profile.num_heads * (num_devices - 1)
    # Search with one more replica than the limit, to report its gain.
    search = Search(
        weights=distinct,
        distinct=which.reshape(-1),
        devices=num_devices,
        max_extra_replicas=min(limit + 1, most) if strategy == "fair_copying" else 0,
        row_split=row_split,
        effort=effort,
    )
    frontier = find_frontier(search, goal, max_slots or profile.num_heads, limit)
    chosen = _judged(weights, fixed, goal)
    if strategy != "static":
        found = _balanced(weights, frontier.within(limit), goal)
        chosen = min(found, chosen, key=lambda candidate: candidate.token_seconds)
    batch = goal.batch(chosen.slots, chosen.fullest_tokens)
    if not batch:
        raise ValueError(_memory_error(goal, chosen, strategy))
    more = frontier.within(limit + 1).token_seconds if strategy == "fair_copying" else np.inf
    shares = np.empty_like(chosen.shares)
    np.put_along_axis(shares, np.broadcast_to(order[:, :, None], shares.shape), chosen.shares, 1)
    bound = frontier.lower_bound(limit, batch)
    return batch, shares, bound, max(0.0, float(chosen.token_seconds / more - 1))


def default_cost(
    profile: Profile,
    num_devices: int,
    hardware: str = "H100",
    *,
    batch: int | None = None,
    itemsize: int = 2,
    kv_cache_dtype: str = "auto",
) -> CostModel:
    """Returns the cost model of the profile's model on `num_devices` devices.

    If the model's shape is unknown, the cost counts cached tokens only.

    >>> from fairkv_jax.plan import Profile, default_cost
    >>> profile = Profile("Llama-3.1-8B", "snapkv", budget=16_384, tokens=[[16_384] * 8] * 32)
    >>> default_cost(profile, num_devices=2, hardware="H100").batch  # as many rows as fit
    60

    Args:
        batch: rows of the decode batch; by default as many rows of this profile as the devices'
            memory holds beside the weights, at most MAX_BATCH.
        itemsize: bytes per weight, and per element of the KV cache if its type is "auto".
        kv_cache_dtype: the type of the KV cache, "auto" or "int8".
    """
    shape = profile.shape or find_shape(profile.model)
    types: Any = {"itemsize": itemsize, "kv_cache_dtype": kv_cache_dtype}
    if shape is None:
        cost = CostModel.tokens_only(hardware, batch=batch or 1, **types)
    else:
        cost = CostModel.of(shape, num_devices, hardware, batch=batch or 1, **types)
    if batch is not None:
        return cost
    slots = -(-profile.num_heads // num_devices)
    weights = cost.rest_bytes + profile.num_layers * slots * cost.head_bytes
    free = HARDWARE[hardware].memory_bytes * MEMORY_UTILIZATION - weights
    row_bytes = float(profile.array.sum()) / num_devices * cost.token_bytes
    return replace(cost, batch=min(MAX_BATCH, max(1, int(free / row_bytes))))


def static_shares(num_layers: int, num_heads: int, num_devices: int) -> np.ndarray:
    """Returns the baseline's shares [L, K, P]: contiguous blocks of heads in checkpoint order."""
    shares = np.zeros((num_layers, num_heads, num_devices))
    for device, heads in enumerate(np.array_split(np.arange(num_heads), num_devices)):
        shares[:, heads, device] = 1.0
    return shares


def _check(
    profile: Profile,
    num_devices: int,
    strategy: str,
    row_split: str,
    max_extra_replicas: int | None,
    max_slots: int | None,
    effort: int,
) -> int:
    """Checks the arguments and returns the limit on extra replicas per layer."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if row_split not in ROW_SPLITS:
        raise ValueError(f"row_split must be one of {', '.join(ROW_SPLITS)}, got {row_split!r}")
    limits = (
        ("num_devices", num_devices, 1),
        ("max_extra_replicas", max_extra_replicas, 0),
        ("effort", effort, 0),
    )
    for name, value, low in (*limits, ("max_slots", max_slots, 1)):
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if value is not None and (not whole or value < low):
            raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}")
    least = -(-profile.num_heads // num_devices)
    if max_slots is not None and max_slots < least:
        raise ValueError(
            f"max_slots {max_slots} cannot hold {profile.num_heads} heads on {num_devices} "
            f"devices: raise it to at least {least}"
        )
    if strategy != "fair_copying":
        return 0
    most = profile.num_heads * (num_devices - 1)
    return most if max_extra_replicas is None else min(int(max_extra_replicas), most)


def _judged(weights: np.ndarray, shares: np.ndarray, goal: Objective) -> Candidate:
    load = np.einsum("lk,lkp->lp", weights, shares)
    slots, fullest = int((shares > 0).sum(1).max()), float(load.sum(0).max())
    seconds = goal.token_seconds(slots, float(load.max(1).sum()), fullest)
    return Candidate(seconds, shares, slots, fullest)


def _balanced(weights: np.ndarray, candidate: Candidate, goal: Objective) -> Candidate:
    load = np.einsum("lk,lkp->lp", weights, candidate.shares)
    return _judged(weights, relabel(candidate.shares, balance_labels(load)), goal)


def _memory_error(goal: Objective, nearest: Candidate, strategy: str) -> str:
    row = nearest.fullest_tokens * goal.cost.token_bytes
    weights = goal.weight_bytes(nearest.slots)
    batch = 1 if goal.name == "throughput" else goal.cost.batch
    fits = max(0, int(((goal.device_bytes or 0) - weights) / row))
    way_out = f": a batch of {fits} fits" if 0 < fits < batch else ": raise it, or use more devices"
    return (
        f"device_bytes {goal.device_bytes:.6g} cannot be met by strategy {strategy!r}: a batch of "
        f"{batch} needs {weights + batch * row:.6g} bytes on the fullest device, "
        f"{weights:.6g} of them weights{way_out}"
    )


def _describe(
    profile: Profile,
    shares: np.ndarray,
    goal: Objective,
    batch: int,
    *,
    strategy: str,
    row_split: str,
    bound: float,
    gain: float,
) -> Plan:
    """Builds the plan from its shares [L, K, P] and computes its figures."""
    cost = goal.at(batch)
    load = np.einsum("lk,lkp->lp", profile.array, shares)
    slots = int((shares > 0).sum(1).max())
    seconds = goal.attention_seconds(slots, float(load.max(1).sum()), batch)
    busy = (shares > 0).sum() * cost.a_seconds
    busy += batch * profile.array.sum() * cost.b_seconds_per_token
    layers = tuple(
        tuple(
            Replica(int(head), int(device), float(layer[head, device]))
            for device, head in np.argwhere(layer.T > 0)
        )
        for layer in shares
    )
    return Plan(
        strategy=strategy,
        row_split=row_split,
        num_devices=shares.shape[2],
        num_heads=profile.num_heads,
        layers=layers,
        cost=cost,
        utilization=float(busy / shares.shape[2] / seconds),
        step_seconds=float(seconds),
        lower_bound_seconds=float(min(bound, seconds)),
        one_more_replica_gain=gain,
        fullest_tokens=float(load.sum(0).max()),
        model=profile.model,
    )
