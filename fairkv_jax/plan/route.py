"""Which replica serves a new row: the rule that the engine follows and the simulator replays."""

import numpy as np


def route(copies: np.ndarray, lengths: np.ndarray, load: np.ndarray) -> np.ndarray:
    """Gives every head of one row the replica whose device is then the least loaded.

    Heads with one copy have no choice, so they are placed first; the others follow in descending
    length. Ties go to the device with the smaller total over layers, then to the lower index.

    Args:
        copies: bool [L, K, P], where each head has a copy; at least one per head.
        lengths: [L, K] cached tokens of the row.
        load: [L, P] cached tokens that the devices hold already; it is not changed.

    Returns:
        The owning device of every layer and head, int32 [L, K].
    """
    num_layers, num_heads, num_devices = copies.shape
    if lengths.shape != (num_layers, num_heads) or load.shape != (num_layers, num_devices):
        raise ValueError(
            f"copies {copies.shape} do not fit lengths {lengths.shape} and load {load.shape}"
        )
    replicas = copies.sum(2)
    if not replicas.all():
        layer, head = np.argwhere(replicas == 0)[0]
        raise ValueError(f"head {head} of layer {layer} has no copy on any device")
    load = load.astype(np.float64)
    owner = copies.argmax(2).astype(np.int32)
    layers = np.arange(num_layers)
    placed = np.where(replicas == 1, lengths, 0)
    for head in range(num_heads):
        load[layers, owner[:, head]] += placed[:, head]
    order = np.argsort(np.where(replicas == 1, np.inf, -lengths), axis=1, kind="stable")
    for rank in range(int((replicas > 1).sum(1).max())):
        heads = order[:, rank]
        chosen = _least_loaded(copies[layers, heads], load)
        free = replicas[layers, heads] > 1
        rows, heads, chosen = layers[free], heads[free], chosen[free]
        owner[rows, heads] = chosen
        load[rows, chosen] += lengths[rows, heads]
    return owner


def _least_loaded(allowed: np.ndarray, load: np.ndarray) -> np.ndarray:
    """The allowed device [L, P] of smallest load per layer; ties by total, then by index."""
    candidates = np.where(allowed, load, np.inf)
    tied = candidates == candidates.min(1, keepdims=True)
    return np.where(tied, load.sum(0), np.inf).argmin(1)
