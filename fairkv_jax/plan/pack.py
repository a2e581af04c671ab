"""Places heads of given weight and replica count on devices: longest first, then local search.

Everything here works on many layers (or many candidates of one layer) at once: the leading axis
N is a batch of independent problems. A head's replicas are equal pieces on distinct devices.
"""

import numpy as np

MAX_ROUNDS = 200
MANY_HEADS = 16


def longest_first(pieces: np.ndarray, replicas: np.ndarray, devices: int, slots: int) -> np.ndarray:
    """The longest-processing-time rule: the heaviest pieces first, each to the least loaded.

    Args:
        pieces: [N, K] load of one replica.
        replicas: int [N, K], at least 1.
        slots: most heads on a device.

    Returns:
        placed: bool [N, K, P]; a head that found too few devices is placed nowhere.
    """
    count, heads = pieces.shape
    rows = np.arange(count)
    load = np.zeros((count, devices))
    used = np.zeros((count, devices), int)
    placed = np.zeros((count, heads, devices), bool)
    # Wide heads first among equals: they need distinct devices while these still have room.
    order = np.lexsort((-replicas, -pieces), axis=1)
    for rank in range(heads):
        head = order[:, rank]
        free = used < slots
        wanted = replicas[rows, head][:, None]
        position = np.where(free, load, np.inf).argsort(1, kind="stable").argsort(1)
        chosen = (position < wanted) & free & (free.sum(1, keepdims=True) >= wanted)
        placed[rows, head] = chosen
        used += chosen
        load += chosen * pieces[rows, head][:, None]
    return placed


def loads(placed: np.ndarray, pieces: np.ndarray) -> np.ndarray:
    """Load of every device [N, P]; infinite where a head is placed nowhere."""
    whole = placed.any(2).sum(1) == placed.shape[1]
    load = np.einsum("nkp,nk->np", placed, pieces)
    return np.where(whole[:, None], load, np.inf)


def tolerance(heads: int) -> float:
    """The relative gap to a bound at which a search may stop: many heads pack well anyway."""
    return 1e-9 if heads <= MANY_HEADS else 1e-3


def local_search(placed: np.ndarray, pieces: np.ndarray, slots: int) -> np.ndarray:
    """Lowers the fullest device by moves and swaps with one other device until none helps.

    Each round takes, in every problem, the exchange after which the fuller of the two devices
    is the least full.
    """
    placed = placed.copy()
    load = loads(placed, pieces)
    open_ = load.max(1) > load.mean(1) * (1 + tolerance(pieces.shape[1]))
    active = np.flatnonzero((placed.any(2).sum(1) == placed.shape[1]) & open_)
    for _ in range(MAX_ROUNDS):
        if not active.size:
            break
        active = active[_exchange(placed, pieces, active, slots)]
        load = loads(placed[active], pieces[active])
        active = active[load.max(1) > load.mean(1) * (1 + tolerance(pieces.shape[1]))]
    return placed


def _exchange(placed: np.ndarray, pieces: np.ndarray, active: np.ndarray, slots: int) -> np.ndarray:
    """Does the best exchange in each active problem; returns, for each, whether there was one."""
    on, weight = placed[active], pieces[active]
    count, heads, devices = on.shape
    rows = np.arange(count)
    load = loads(on, weight)
    fullest = load.argmax(1)
    peak = load[rows, fullest]
    here = on[rows, :, fullest]
    # Only heads on the fullest device can leave it: at most as many as it has slots.
    leaving = np.argsort(~here, axis=1, kind="stable")[:, : int(here.sum(1).max())]
    is_there = here[rows[:, None], leaving]
    # Index `heads` of the second axis stands for no head: a plain move, if there is a slot left.
    given = np.concatenate([weight, np.zeros((count, 1))], 1)
    taken = np.concatenate(
        [on & ~here[:, :, None], (on.sum(1) < slots)[:, None, :]],
        1,
    )
    moved = weight[rows[:, None], leaving][:, :, None, None] - given[:, None, :, None]
    absent = ~on[rows[:, None], leaving]
    allowed = is_there[:, :, None, None] & absent[:, :, None, :] & taken[:, None, :, :]
    after = np.maximum(peak[:, None, None, None] - moved, load[:, None, None, :] + moved)
    after = np.where(allowed, after, np.inf).reshape(count, -1)
    best = after.argmin(1)
    better = after[rows, best] < peak * (1 - 1e-12)
    out, into, device = np.unravel_index(best, (leaving.shape[1], heads + 1, devices))
    out = leaving[rows, out]
    for row in np.flatnonzero(better):
        layer = placed[active[row]]
        layer[out[row], fullest[row]] = False
        layer[out[row], device[row]] = True
        if into[row] < heads:
            layer[into[row], device[row]] = False
            layer[into[row], fullest[row]] = True
    return better
