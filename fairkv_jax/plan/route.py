"""Rules that assign rows to replicas, for the engine and for the simulator."""

import numpy as np


def route(replicas: np.ndarray, lengths: np.ndarray, load: np.ndarray) -> np.ndarray:
    """Gives every head of one row the replica whose device is then the least loaded.

    Heads with one replica have no choice, so they are placed first; the others follow in descending
    length. Ties go to the device with the smaller total over layers, then to the lower index.

    Args:
        replicas: bool [L, K, P], where each head has a replica; at least one per head.
        lengths: [L, K] cached tokens of the row.
        load: [L, P] cached tokens that the devices hold already; it is not changed.

    Returns:
        The owning device of every layer and head, int32 [L, K].
    """
    num_layers, num_heads, num_devices = replicas.shape
    if lengths.shape != (num_layers, num_heads) or load.shape != (num_layers, num_devices):
        raise ValueError(
            f"replicas {replicas.shape} do not fit lengths {lengths.shape} and load {load.shape}"
        )
    num_replicas = replicas.sum(2)
    if not num_replicas.all():
        layer, head = np.argwhere(num_replicas == 0)[0]
        raise ValueError(f"head {head} of layer {layer} has no replica on any device")
    load = load.astype(np.float64)
    owner = replicas.argmax(2).astype(np.int32)
    layers = np.arange(num_layers)
    placed = np.where(num_replicas == 1, lengths, 0)
    for head in range(num_heads):
        load[layers, owner[:, head]] += placed[:, head]
    order = np.argsort(np.where(num_replicas == 1, np.inf, -lengths), axis=1, kind="stable")
    for rank in range(int((num_replicas > 1).sum(1).max())):
        heads = order[:, rank]
        chosen = _least_loaded(replicas[layers, heads], load)
        free = num_replicas[layers, heads] > 1
        rows, heads, chosen = layers[free], heads[free], chosen[free]
        owner[rows, heads] = chosen
        load[rows, chosen] += lengths[rows, heads]
    return owner


def row_counts(shares: np.ndarray, batch: int) -> np.ndarray:
    """Rounds shares to whole rows by the largest remainder.

    Every replica first gets the whole part of its due; the rows left over go, one each, to the
    largest remainders, ties to the lower device. So counts differ from their dues by less than 1.

    Args:
        shares: [..., P], adding to 1 over devices.

    Returns:
        int [..., P], adding to `batch`; 0 where the share is 0.
    """
    due = np.asarray(shares, np.float64) * batch
    if not np.allclose(due.sum(-1), batch):
        raise ValueError("the shares of every head must add to 1 over the devices")
    # A due within rounding of a whole number is that number.
    counts = np.floor(due + 1e-9).astype(int)
    remainder = np.where(np.asarray(shares) > 0, due - counts, -np.inf)
    order = np.argsort(-remainder, axis=-1, kind="stable")
    rank = np.argsort(order, axis=-1, kind="stable")
    return counts + (rank < batch - counts.sum(-1, keepdims=True))


def _least_loaded(allowed: np.ndarray, load: np.ndarray) -> np.ndarray:
    """The allowed device [L, P] of smallest load per layer; ties by total, then by index."""
    candidates = np.where(allowed, load, np.inf)
    tied = candidates == candidates.min(1, keepdims=True)
    return np.where(tied, load.sum(0), np.inf).argmin(1)
