"""Free shares: splits heads so that every device is filled to the same level.

McNaughton's wrap-around rule (Scheduling with deadlines and loss functions, 1959) needs at most
P-1 splits to fill P devices to exactly the mean. Here the splits start from a placement without
copies, so that as few heads as possible move, and stop at the lowest level that the limits allow.
"""

import numpy as np

BISECTIONS = 40


def proportional_splits(
    weights: np.ndarray, start: np.ndarray, slots: int, max_copies: int
) -> np.ndarray:
    """Levels one layer by moving parts of heads from full devices to empty ones.

    Args:
        weights: [K] load of a head.
        start: shares [K, P] to begin with, within the limits.

    Returns:
        shares [K, P] whose fullest device is at most as full as that of `start`.
    """
    best, high = start, (weights @ start).max()
    low = weights.sum() / start.shape[1]
    for _ in range(BISECTIONS):
        level = low if best is start else (low + high) / 2
        shares = _fill_to(level, weights, start, slots, max_copies)
        if shares is None:
            low = level
            if best is start:
                low = level = (low + high) / 2
                shares = _fill_to(level, weights, start, slots, max_copies)
        if shares is not None:
            best, high = shares, (weights @ shares).max()
        if high - low <= 1e-9 * high:
            break
    return best


def _fill_to(
    level: float, weights: np.ndarray, start: np.ndarray, slots: int, max_copies: int
) -> np.ndarray | None:
    """Shares with no device above `level`, or None if the limits run out first."""
    shares = start.copy()
    load = weights @ shares
    tolerance = 1e-12 * load.sum()
    while load.max() > level + tolerance:
        full = int(load.argmax())
        part = shares[:, full] * weights
        move = _best_move(part, shares, load, level, full, slots)
        if move is None:
            return None
        head, device, amount = move
        whole = amount >= part[head] * (1 - 1e-12)
        share = shares[head, full] if whole else amount / weights[head]
        shares[head, device] += share
        shares[head, full] = 0.0 if whole else shares[head, full] - share
        if (shares > 0).sum() - len(weights) > max_copies:
            return None
        load = weights @ shares
    return shares


def _best_move(
    part: np.ndarray, shares: np.ndarray, load: np.ndarray, level: float, full: int, slots: int
) -> tuple[int, int, float] | None:
    """The head, the device and the amount that bring the fullest device down most."""
    room = level - load
    free = (shares > 0).sum(0) < slots
    open_to = (free[None, :] | (shares > 0)) & (part > 0)[:, None]
    open_to[:, full] = False
    amount = np.minimum(np.minimum(part[:, None], room[None, :]), load[full] - level)
    amount = np.where(open_to, amount, 0.0)
    if amount.max() <= 1e-15 * load.sum():
        return None
    # Among moves of the same amount prefer one that needs no copy: the head is there already.
    grows = (shares == 0) & (amount < part[:, None] * (1 - 1e-12))
    top = amount >= amount.max() * (1 - 1e-12)
    choice = int(np.where(top, grows, 2).argmin())
    head, device = np.unravel_index(choice, amount.shape)
    return int(head), int(device), float(amount[head, device])
