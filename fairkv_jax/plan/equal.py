"""Which heads to copy when the rows of a head are split equally among its replicas."""

import numpy as np

from fairkv_jax.plan.pack import loads, local_search, longest_first


def equal_splits(weights: np.ndarray, devices: int, slots: int, max_copies: int) -> np.ndarray:
    """Adds copies one by one, each time of the head whose copy helps most.

    A step may not lower the fullest device (two heads can be equally heavy), so it also counts
    how even the loads are; the best placement seen so far is what is returned.

    Args:
        weights: [L, K] load of a head.

    Returns:
        shares [copies + 1, L, K, P]: entry e uses at most e copies in every layer.
    """
    num_heads = weights.shape[1]
    replicas = np.ones(weights.shape, int)
    placed = local_search(longest_first(weights, replicas, devices, slots), weights, slots)
    shares, peak = placed.astype(float), loads(placed, weights).max(1)
    found = [shares]
    for _ in range(min(max_copies, slots * devices - num_heads, num_heads * (devices - 1))):
        replicas = _one_more(weights, replicas, devices, slots)
        pieces = weights / replicas
        placed = local_search(longest_first(pieces, replicas, devices, slots), pieces, slots)
        reached = loads(placed, pieces).max(1)
        better = reached < peak * (1 - 1e-12)
        peak = np.where(better, reached, peak)
        shares = np.where(better[:, None, None], placed / replicas[:, :, None], shares)
        found.append(shares)
    while len(found) <= max_copies:
        found.append(shares)
    return np.stack(found)


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
