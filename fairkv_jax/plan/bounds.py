"""What no placement can beat: lower bounds on the fullest device of a layer."""

import numpy as np


def lower_bounds(
    weights: np.ndarray, devices: int, slots: int, max_extra_replicas: int
) -> np.ndarray:
    """A bound that holds for equal and for free shares alike.

    The fullest device holds at least the mean; at least the largest piece, when the copies go to
    cutting the largest pieces one by one; and, without copies, as much as i+1 of the i*P+1
    heaviest heads, of which two, three, ... must meet on one device.

    Args:
        weights: [L, K] in descending order.

    Returns:
        [max_extra_replicas + 1, L]: entry e is for at most e copies.
    """
    num_layers, num_heads = weights.shape
    pieces = np.ones(weights.shape, int)
    rows = np.arange(num_layers)
    mean = weights.sum(1) / devices
    bounds = [np.maximum(mean, _meeting(weights, devices))]
    for extra in range(1, max_extra_replicas + 1):
        largest = (weights / pieces).argmax(1)
        if num_heads + extra <= slots * devices:
            pieces[rows, largest] += pieces[rows, largest] < devices
        bounds.append(np.maximum(mean, (weights / pieces).max(1)))
    bounds[0] = np.maximum(bounds[0], weights[:, 0])
    return np.stack(bounds)


def _meeting(weights: np.ndarray, devices: int) -> np.ndarray:
    """The pigeonhole bound of heads that are not split, [L]."""
    bound = weights[:, 0]
    for together in range(2, -(-weights.shape[1] // devices) + 1):
        last = (together - 1) * devices + 1
        bound = np.maximum(bound, weights[:, last - together : last].sum(1))
    return bound
