"""Which heads to copy when the rows of a head are split equally among its replicas."""

import numpy as np

from fairkv_jax.plan.pack import loads, local_search, longest_first, tolerance

CHUNK = 20_000
SEARCHED = 4
"""Choices per layer and number of copies that local search refines, of those that packed best."""


def equal_splits(
    weights: np.ndarray, devices: int, slots: int, max_extra_replicas: int
) -> np.ndarray:
    """Adds copies one by one, each time of the head whose copy helps most.

    A step may not lower the fullest device (two heads can be equally heavy), so it also counts
    how even the loads are; the best placement seen so far is what is returned.

    Args:
        weights: [L, K] load of a head.

    Returns:
        shares [max_extra_replicas + 1, L, K, P]: entry e uses at most e copies in every layer.
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
    """Packs every choice of replicas whose bound leaves hope; improves `found` where one is better.

    Args:
        found: shares [max_extra_replicas + 1, L, K, P] as `equal_splits` gives them.
        choices: int [R, K] replicas per head.
        bounds: [L, R] what each choice cannot beat.
    """
    devices = found.shape[3]
    copies = choices.sum(1) - choices.shape[1]
    possible = (copies < len(found)) & (choices.sum(1) <= slots * devices)
    peaks = np.einsum("elkp,lk->elp", found, weights).max(2)
    reached = peaks[np.minimum(copies, len(found) - 1)].T
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
    order = np.lexsort((packed, copies[rows], layers))
    group = layers[order] * len(found) + copies[rows[order]]
    rank = np.arange(len(order)) - np.searchsorted(group, group)
    order = order[(rank < SEARCHED) & np.isfinite(packed[order])]
    layers, rows = layers[order], rows[order]
    pieces = weights[layers] / choices[rows]
    placed = longest_first(pieces, choices[rows], devices, slots)
    placed = local_search(placed, pieces, slots)
    packed = loads(placed, pieces).max(1)
    found = found.copy()
    for at, layer in enumerate(layers):
        for extra in range(int(copies[rows[at]]), len(found)):
            if packed[at] < peaks[extra, layer] * (1 - 1e-12):
                peaks[extra, layer] = packed[at]
                found[extra, layer] = placed[at] / choices[rows[at]][:, None]
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
