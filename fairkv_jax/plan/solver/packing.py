"""Searches for placements of heads whose rows are split equally among their replicas.

Most functions work on many layers (or many candidates of one layer) at once: the leading axis is a
batch of independent problems. A head's replicas are equal pieces on distinct devices.
"""

from itertools import combinations
from math import comb

import numpy as np

MAX_ROUNDS = 200
MANY_HEADS = 16
MAX_CHOICES = 13_000
CHUNK = 20_000
SEARCHED = 4
"""Number of choices per layer and replica count that local search refines: the best packed."""


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
    """Makes the best exchange in each active problem and returns which problems had one."""
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


def replica_choices(heads: int, devices: int, max_extra_replicas: int) -> np.ndarray:
    """Every replica count per head, int [R, K], fewest extra replicas first.

    As many extra replicas as `max_extra_replicas` and MAX_CHOICES allow: 8 heads with up to 8
    extra replicas have 12,870 choices. More than MANY_HEADS heads have only the choice without
    extra replicas, because the greedy search balances them well enough.
    """
    if heads > MANY_HEADS:
        max_extra_replicas = 0
    while comb(heads + max_extra_replicas, heads) > MAX_CHOICES:
        max_extra_replicas -= 1
    # Stars and bars: the last bin holds the extra replicas that are not used.
    bars = np.array(list(combinations(range(heads + max_extra_replicas), heads)))
    extra = np.diff(bars, axis=1, prepend=-1) - 1
    extra = extra[(extra < devices).all(1)]
    return extra[np.argsort(extra.sum(1), kind="stable")] + 1


def choice_bounds(weights: np.ndarray, choices: np.ndarray, devices: int) -> np.ndarray:
    """A lower bound on the fullest device for every layer and choice, [L, R].

    The mean, the largest piece, and the pigeonhole: of the i*P+1 heaviest pieces some i+1 share
    a device.
    """
    most = int(choices.sum(1).max())
    number = np.arange(choices.shape[1])
    bounds = np.empty((len(weights), len(choices)))
    # Piece j of choice r belongs to head owner[r, j]; choices of fewer pieces are padded with -1.
    owner = np.full((len(choices), most), -1)
    for row, counts in enumerate(choices):
        pieces = np.repeat(number, counts)
        owner[row, : len(pieces)] = pieces
    for layer, heads in enumerate(weights):
        size = np.concatenate([heads / choices, np.zeros((len(choices), 1))], 1)
        pieces = -np.sort(-np.take_along_axis(size, owner % (len(heads) + 1), 1), 1)
        bound = np.maximum(pieces[:, 0], heads.sum() / devices)
        for together in range(2, -(-most // devices) + 1):
            last = (together - 1) * devices + 1
            bound = np.maximum(bound, pieces[:, last - together : last].sum(1))
        bounds[layer] = bound
    return bounds


def equal_splits(
    weights: np.ndarray, devices: int, slots: int, max_extra_replicas: int
) -> np.ndarray:
    """Adds extra replicas one by one, each time for the head whose replica helps most.

    One replica does not always lower the load of the fullest device (two heads can be equally
    heavy), so ties are broken by how even the loads are. Entry e is the best placement seen with at
    most e extra replicas.

    Args:
        weights: [L, K] load of a head.

    Returns:
        shares [max_extra_replicas + 1, L, K, P]: entry e uses at most e extra replicas per layer.
    """
    num_heads = weights.shape[1]
    replicas = np.ones(weights.shape, int)
    placed = local_search(longest_first(weights, replicas, devices, slots), weights, slots)
    shares, peak = placed.astype(float), loads(placed, weights).max(1)
    found = [shares]
    mean = weights.sum(1) / devices
    for _ in range(min(max_extra_replicas, slots * devices - num_heads, num_heads * (devices - 1))):
        open_ = np.flatnonzero(peak > mean * (1 + tolerance(num_heads)))
        if not open_.size:
            break
        replicas[open_] = _one_more(weights[open_], replicas[open_], devices, slots)
        counts, pieces = replicas[open_], weights[open_] / replicas[open_]
        placed = local_search(longest_first(pieces, counts, devices, slots), pieces, slots)
        shares = shares.copy()
        shares[open_], peak[open_] = _better(shares[open_], peak[open_], placed, pieces, counts)
        found.append(shares)
    while len(found) <= max_extra_replicas:
        found.append(shares)
    return np.stack(found)


def try_choices(
    weights: np.ndarray,
    found: np.ndarray,
    choices: np.ndarray,
    bounds: np.ndarray,
    slots: int,
) -> np.ndarray:
    """Packs every choice of replicas whose bound is below `found`, and returns what is better.

    Args:
        found: shares [max_extra_replicas + 1, L, K, P] as `equal_splits` gives them.
        choices: int [R, K] replicas per head.
        bounds: [L, R] lower bound of each choice.
    """
    devices = found.shape[3]
    extra = choices.sum(1) - choices.shape[1]
    possible = (extra < len(found)) & (choices.sum(1) <= slots * devices)
    peaks = np.einsum("elkp,lk->elp", found, weights).max(2)
    reached = peaks[np.minimum(extra, len(found) - 1)].T
    worth = 1 - tolerance(choices.shape[1])
    layers, rows = np.nonzero((bounds < reached * worth) & possible)
    if not len(layers):
        return found
    packed = np.empty(len(layers))
    for at in range(0, len(layers), CHUNK):
        part = slice(at, at + CHUNK)
        pieces = weights[layers[part]] / choices[rows[part]]
        packed[part] = loads(
            longest_first(pieces, choices[rows[part]], devices, slots), pieces
        ).max(1)
    order = np.lexsort((packed, extra[rows], layers))
    group = layers[order] * len(found) + extra[rows[order]]
    rank = np.arange(len(order)) - np.searchsorted(group, group)
    order = order[(rank < SEARCHED) & np.isfinite(packed[order])]
    layers, rows = layers[order], rows[order]
    pieces = weights[layers] / choices[rows]
    placed = longest_first(pieces, choices[rows], devices, slots)
    placed = local_search(placed, pieces, slots)
    packed = loads(placed, pieces).max(1)
    found = found.copy()
    for at, layer in enumerate(layers):
        for entry in range(int(extra[rows[at]]), len(found)):
            if packed[at] < peaks[entry, layer] * (1 - 1e-12):
                peaks[entry, layer] = packed[at]
                found[entry, layer] = placed[at] / choices[rows[at]][:, None]
    return found


def _better(
    shares: np.ndarray, peak: np.ndarray, placed: np.ndarray, pieces: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Per layer the placement with the lower fullest device, and how full that is."""
    reached = loads(placed, pieces).max(1)
    better = reached < peak * (1 - 1e-12)
    shares = np.where(better[:, None, None], placed / counts[:, :, None], shares)
    return shares, np.where(better, reached, peak)


def _one_more(weights: np.ndarray, replicas: np.ndarray, devices: int, slots: int) -> np.ndarray:
    """`replicas` with the one head more, per layer, that packs best; unchanged where none fits."""
    num_layers, num_heads = weights.shape
    tried = min(num_heads, 2 * devices)
    heads = np.argsort(-weights / replicas, axis=1, kind="stable")[:, :tried]
    layers = np.repeat(np.arange(num_layers), tried)
    candidates = replicas[layers]
    candidates[np.arange(len(layers)), heads.ravel()] += 1
    pieces = weights[layers] / candidates
    load = loads(longest_first(pieces, candidates, devices, slots), pieces)
    peak = load.max(1).reshape(num_layers, tried)
    spread = np.where(np.isfinite(load), load, 0).var(1).reshape(num_layers, tried)
    best = np.lexsort((spread, peak), axis=1)[:, 0]
    rows = np.arange(num_layers)
    fits = np.isfinite(peak[rows, best])
    grown = candidates.reshape(num_layers, tried, num_heads)[rows, best]
    return np.where(fits[:, None], grown, replicas)
