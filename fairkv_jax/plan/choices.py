"""All ways of giving a few copies to a few heads, each with a bound on what it can reach."""

from itertools import combinations
from math import comb

import numpy as np

from fairkv_jax.plan.pack import MANY_HEADS

MAX_CHOICES = 13_000


def replica_choices(heads: int, devices: int, max_extra_replicas: int) -> np.ndarray:
    """Every replica count per head, int [R, K], fewest copies first.

    As many extra replicas as `max_extra_replicas` and MAX_CHOICES allow: 8 heads with up to 8
    extra replicas have 12,870 choices. More than MANY_HEADS heads have only the choice without
    extra replicas, because the greedy search balances them well enough.
    """
    if heads > MANY_HEADS:
        max_extra_replicas = 0
    while comb(heads + max_extra_replicas, heads) > MAX_CHOICES:
        max_extra_replicas -= 1
    # Stars and bars: the last bin holds the copies that are not used.
    bars = np.array(list(combinations(range(heads + max_extra_replicas), heads)))
    copies = np.diff(bars, axis=1, prepend=-1) - 1
    copies = copies[(copies < devices).all(1)]
    return copies[np.argsort(copies.sum(1), kind="stable")] + 1


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
