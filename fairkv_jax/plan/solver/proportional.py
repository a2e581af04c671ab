"""Free shares: splits heads so that every device is filled to the same level.

McNaughton's wrap-around rule (Scheduling with deadlines and loss functions, 1959) needs at most
P-1 splits to fill P devices to exactly the mean. Here the splits start from a placement of whole
heads, so that few of them are cut and slots stay few, and stop at the lowest level that the
limits allow: each split fills one device or relieves one, so P-1 still suffice for the mean.
"""

import numpy as np

BISECTIONS = 30


def proportional_splits(
    weights: np.ndarray, start: np.ndarray, slots: int, max_extra_replicas: np.ndarray
) -> np.ndarray:
    """Levels the devices by moving parts of heads from full ones to empty ones.

    Args:
        weights: [N, K] load of a head, in N independent layers.
        start: shares [N, K, P] to begin with, within the limits.
        max_extra_replicas: [N] most extra replicas beyond one per head.

    Returns:
        shares [N, K, P] whose fullest device is at most as full as that of `start`.
    """
    best = start.copy()
    low = weights.sum(1) / start.shape[2]
    high = _loads(weights, start).max(1)
    level = low.copy()
    active = np.flatnonzero(high > low * (1 + 1e-12))
    for _ in range(BISECTIONS):
        if not active.size:
            break
        shares, done = _fill_to(
            level[active], weights[active], start[active], slots, max_extra_replicas[active]
        )
        reached, missed = active[done], active[~done]
        best[reached] = shares[done]
        high[reached] = _loads(weights[reached], shares[done]).max(1)
        low[missed] = level[missed]
        level = (low + high) / 2
        active = active[high[active] > low[active] * (1 + 1e-7)]
    return best


def _loads(weights: np.ndarray, shares: np.ndarray) -> np.ndarray:
    return np.einsum("nk,nkp->np", weights, shares)


def _fill_to(
    level: np.ndarray,
    weights: np.ndarray,
    start: np.ndarray,
    slots: int,
    max_extra_replicas: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Shares with no device above `level` [N], and for each layer whether the limits allowed it."""
    shares = start.copy()
    heads = weights.shape[1]
    tolerance = 1e-12 * weights.sum(1)
    done = np.zeros(len(level), bool)
    active = np.arange(len(level))
    while active.size:
        load = _loads(weights[active], shares[active])
        level_reached = load.max(1) <= (level + tolerance)[active]
        done[active[level_reached]] = True
        active, load = active[~level_reached], load[~level_reached]
        if not active.size:
            break
        moved = _move(shares, weights, active, load, level[active], slots)
        within = (shares[active] > 0).sum((1, 2)) - heads <= max_extra_replicas[active]
        active = active[moved & within]
    return shares, done


def _move(
    shares: np.ndarray,
    weights: np.ndarray,
    active: np.ndarray,
    load: np.ndarray,
    level: np.ndarray,
    slots: int,
) -> np.ndarray:
    """Makes the best move in each active layer, and returns the layers in which one was found."""
    rows = np.arange(len(active))
    current = shares[active]
    full = load.argmax(1)
    part = current[rows, :, full] * weights[active]
    room = np.minimum(level[:, None] - load, (load[rows, full] - level)[:, None])
    free = (current > 0).sum(1) < slots
    allowed = (free[:, None, :] | (current > 0)) & (part > 0)[:, :, None]
    amount = np.where(allowed, np.minimum(part[:, :, None], room[:, None, :]), 0.0)
    amount[rows, :, full] = 0.0
    largest = amount.max((1, 2), keepdims=True)
    # Among moves of the same amount prefer one that needs no replica: the head is there already, or
    # leaves the fullest device altogether.
    whole = amount >= part[:, :, None] * (1 - 1e-12)
    grows = np.where((current == 0) & ~whole, 1, 0)
    rank = np.where(amount >= largest * (1 - 1e-12), grows, 2).reshape(len(active), -1)
    head, device = np.unravel_index(rank.argmin(1), amount.shape[1:])
    share = current[rows, head, full]
    given = amount[rows, head, device] / weights[active, head]
    given = np.where(whole[rows, head, device], share, given)
    movable = largest[:, 0, 0] > 1e-15 * weights[active].sum(1)
    where = active[movable], head[movable]
    shares[*where, device[movable]] += given[movable]
    shares[*where, full[movable]] = (share - given)[movable]
    return movable
