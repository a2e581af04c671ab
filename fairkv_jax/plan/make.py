"""Makes a plan: one registry of strategies, and the choice of the number of slots."""

import numpy as np

from fairkv_jax.plan.cost import CostModel
from fairkv_jax.plan.equal import equal_splits
from fairkv_jax.plan.labels import balance_labels
from fairkv_jax.plan.plan import Copy, Plan
from fairkv_jax.plan.profile import Profile
from fairkv_jax.plan.proportional import proportional_splits
from fairkv_jax.plan.shape import find_shape

STRATEGIES = ("static", "best_effort", "fair_copying")
ROW_SPLITS = ("equal", "proportional")


def make_plan(
    profile: Profile,
    n_devices: int,
    strategy: str = "fair_copying",
    *,
    row_split: str = "equal",
    max_copies: int | None = None,
    cost: CostModel | None = None,
) -> Plan:
    """Assigns the heads of every layer to devices so that a decode step is short."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if row_split not in ROW_SPLITS:
        raise ValueError(f"row_split must be one of {', '.join(ROW_SPLITS)}, got {row_split!r}")
    if isinstance(n_devices, bool) or not isinstance(n_devices, int) or n_devices < 1:
        raise ValueError(f"n_devices must be an integer of at least 1, got {n_devices!r}")
    copies = n_devices - 1 if max_copies is None else max_copies
    if copies < 0:
        raise ValueError(f"max_copies must be at least 0, got {max_copies}")
    cost = default_cost(profile, n_devices) if cost is None else cost
    weights = profile.array
    if strategy == "static":
        shares = static_shares(weights, n_devices)
    else:
        shares = _planned(
            weights, n_devices, copies * (strategy == "fair_copying"), row_split, cost
        )
    return _to_plan(profile, shares, strategy, row_split, cost)


def default_cost(profile: Profile, n_devices: int) -> CostModel:
    """An H100's cost at a batch of 16; of tokens alone where the model's widths are unknown."""
    shape = profile.shape or find_shape(profile.model)
    return CostModel.tokens_only() if shape is None else CostModel.of(shape, n_devices)


def static_shares(weights: np.ndarray, n_devices: int) -> np.ndarray:
    """Contiguous blocks of heads in checkpoint order, shares [L, K, P]: the baseline."""
    num_layers, num_heads = weights.shape
    shares = np.zeros((num_layers, num_heads, n_devices))
    for device, heads in enumerate(np.array_split(np.arange(num_heads), n_devices)):
        shares[:, heads, device] = 1.0
    return shares


def _planned(
    weights: np.ndarray, n_devices: int, max_copies: int, row_split: str, cost: CostModel
) -> np.ndarray:
    """The cheapest shares [L, K, P] over the numbers of slots that can pay."""
    num_layers, num_heads = weights.shape
    order = np.argsort(-weights, axis=1, kind="stable")
    heavy_first = np.take_along_axis(weights, order, 1)
    least = -(-num_heads // n_devices)
    best, best_seconds = static_shares(weights, n_devices), np.inf
    best_seconds = step_seconds(weights, best, cost)
    for slots in range(least, num_heads + 1):
        floor = num_layers * slots * cost.a_seconds
        floor += weights.sum() / n_devices * cost.batch * cost.b_seconds_per_token
        if floor >= best_seconds * (1 - 1e-12):
            break
        shares = equal_splits(heavy_first, n_devices, slots, max_copies)[-1]
        if row_split == "proportional" and max_copies:
            start = equal_splits(heavy_first, n_devices, slots, 0)[-1]
            level = [
                proportional_splits(w, s, slots, max_copies)
                for w, s in zip(heavy_first, start, strict=True)
            ]
            shares = np.stack(level)
        seconds = step_seconds(heavy_first, shares, cost)
        if seconds < best_seconds * (1 - 1e-12):
            best_seconds, best = seconds, np.empty_like(shares)
            np.put_along_axis(best, order[:, :, None], shares, 1)
    return _relabel(weights, best)


def step_seconds(weights: np.ndarray, shares: np.ndarray, cost: CostModel) -> float:
    """Attention's part of a step: C slots and the fullest device's tokens, over all layers."""
    load = np.einsum("lk,lkp->lp", weights, shares)
    slots = int((shares > 0).sum(1).max())
    tokens = load.max(1).sum()
    return len(weights) * slots * cost.a_seconds + cost.batch * tokens * cost.b_seconds_per_token


def _relabel(weights: np.ndarray, shares: np.ndarray) -> np.ndarray:
    labels = balance_labels(np.einsum("lk,lkp->lp", weights, shares))
    moved = np.empty_like(shares)
    np.put_along_axis(moved, labels[:, None, :], shares, 2)
    return moved


def _to_plan(
    profile: Profile, shares: np.ndarray, strategy: str, row_split: str, cost: CostModel
) -> Plan:
    weights = profile.array
    num_layers, num_heads, n_devices = shares.shape
    load = np.einsum("lk,lkp->lp", weights, shares)
    seconds = step_seconds(weights, shares, cost)
    busy = (shares > 0).sum() * cost.a_seconds
    busy += cost.batch * weights.sum() * cost.b_seconds_per_token
    slots = -(-num_heads // n_devices)
    bound = num_layers * slots * cost.a_seconds
    bound += cost.batch * weights.sum() / n_devices * cost.b_seconds_per_token
    return Plan(
        strategy=strategy,
        row_split=row_split,
        n_devices=n_devices,
        n_heads=num_heads,
        layers=tuple(
            tuple(
                Copy(int(head), int(device), float(layer[head, device]))
                for device, head in np.argwhere(layer.T > 0)
            )
            for layer in shares
        ),
        cost=cost,
        utilization=float(busy / n_devices / seconds),
        step_seconds=float(seconds),
        lower_bound_seconds=float(min(bound, seconds)),
        fullest_tokens=float(load.sum(0).max()),
        model=profile.model,
    )
