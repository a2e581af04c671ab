"""Assigns rows to replicas, in the engine and in the simulator."""

import numpy as np

_LEAST_GAIN = 0.05
"""How much lighter copies of a document must make the fullest device, as a fraction."""


def route(replicas: np.ndarray, lengths: np.ndarray, load: np.ndarray) -> np.ndarray:
    """Selects a replica for every head of one row, so that the load of the devices is balanced.

    Heads with a single replica are assigned first. The others follow in descending length, each to
    the least loaded of its devices. Ties go to the device with the smaller total over layers, then
    to the lower index.

    >>> import numpy as np
    >>> from fairkv_jax.plan import route
    >>> replicas = np.array([[[True, True], [True, False], [False, True]]])
    >>> route(replicas, np.array([[500, 100, 300]]), load=np.array([[400, 0]])).tolist()
    [[1, 0, 1]]

    Args:
        replicas: bool [L, K, P], whether a head has a replica on a device; at least one per head.
        lengths: [L, K] cached tokens of the row.
        load: [L, P] cached tokens on the devices; it is not changed.

    Returns:
        The device of every layer and head, int32 [L, K].
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
        free = num_replicas[layers, heads] > 1
        added = np.where(free, lengths[layers, heads], 0)
        chosen = _least_loaded(replicas[layers, heads], load, added)
        rows, heads, chosen = layers[free], heads[free], chosen[free]
        owner[rows, heads] = chosen
        load[rows, chosen] += lengths[rows, heads]
    return owner


def route_beyond(
    replicas: np.ndarray, holders: np.ndarray, lengths: np.ndarray, load: np.ndarray
) -> np.ndarray:
    """Selects a replica for every head of a row that begins with a shared document.

    Only some replicas hold the document. If selecting among all of them makes the fullest device
    lighter by more than 5 %, summed over layers, they are selected, and the heads must be copied
    there; otherwise, only those that hold it. The other arguments are those of `route`.

    >>> import numpy as np
    >>> from fairkv_jax.plan import route_beyond
    >>> replicas = np.array([[[True, True], [True, False], [False, True]]])
    >>> holders = np.array([[[True, False], [True, False], [False, True]]])
    >>> for load in ([[0, 0]], [[400, 0]]):  # the second load is worth a copy of head 0
    ...     print(route_beyond(replicas, holders, np.array([[500, 100, 300]]), np.array(load)))
    [[0 0 1]]
    [[1 0 1]]

    Args:
        holders: bool [L, K, P], whether the replica of a head holds the document; at least one per
            head.

    Returns:
        The device of every layer and head, int32 [L, K].
    """
    within = route(holders, lengths, load)
    if (holders == replicas).all():
        return within
    beyond = route(replicas, lengths, load)
    gains = _peak(within, lengths, load) > (1 + _LEAST_GAIN) * _peak(beyond, lengths, load)
    return beyond if gains else within


def row_counts(shares: np.ndarray, batch: int) -> np.ndarray:
    """Rounds shares to whole rows by the largest remainder.

    Every replica first gets the integer part of share * batch. The remaining rows go to the largest
    fractional parts, one each, and ties to the lower device. So every count differs from
    share * batch by less than 1.

    >>> import numpy as np
    >>> from fairkv_jax.plan import row_counts
    >>> row_counts(np.array([0.5, 0.3, 0.2]), batch=8).tolist()
    [4, 2, 2]

    Args:
        shares: [..., P], which sum to 1 over devices.

    Returns:
        int [..., P], which sum to `batch`; 0 where the share is 0.
    """
    due = np.asarray(shares, np.float64) * batch
    if not np.allclose(due.sum(-1), batch):
        raise ValueError("the shares of every head must sum to 1 over the devices")
    # Rounding errors must not push an integer below itself.
    counts = np.floor(due + 1e-9).astype(int)
    remainder = np.where(np.asarray(shares) > 0, due - counts, -np.inf)
    order = np.argsort(-remainder, axis=-1, kind="stable")
    rank = np.argsort(order, axis=-1, kind="stable")
    return counts + (rank < batch - counts.sum(-1, keepdims=True))


def _peak(owner: np.ndarray, lengths: np.ndarray, load: np.ndarray) -> float:
    """Returns the tokens on the fullest device with one more row, summed over layers."""
    load = load.astype(np.float64)
    np.add.at(load, (np.arange(len(load))[:, None], owner), lengths)
    return float(load.max(1).sum())


def _least_loaded(candidates: np.ndarray, load: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Returns the candidate with the least load in each layer; ties go by total, then by index.

    The totals include the `lengths` [L] that are assigned, once in the order of the layers: with
    an empty cache every layer has a tie.
    """
    candidates = np.where(candidates, load, np.inf)
    tied = candidates == candidates.min(1, keepdims=True)
    chosen, total = tied.argmax(1), load.sum(0)
    is_open = tied.sum(1) > 1
    np.add.at(total, chosen[~is_open], lengths[~is_open])
    for layer in np.flatnonzero(is_open):
        chosen[layer] = np.where(tied[layer], total, np.inf).argmin()
        total[chosen[layer]] += lengths[layer]
    return chosen
