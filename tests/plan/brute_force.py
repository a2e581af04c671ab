"""Exhaustive search over placements: the oracle of the planner, written from the definitions."""

from itertools import combinations, product

import numpy as np


def better_layer_exists(
    weights: np.ndarray, devices: int, slots: int, copies: int, target: float
) -> bool:
    """Whether equal splits can keep every device of one layer below `target`.

    Goes head by head over all sets of devices. Devices are alike, so states that differ only in
    the order of the devices are visited once, unless an order matters to nobody but the reader.
    """
    states = {((0.0, 0),) * devices: 0}
    for weight in sorted(weights, reverse=True):
        following: dict[tuple, int] = {}
        for state, used in states.items():
            for count in range(1, min(devices, copies - used + 1) + 1):
                for chosen in combinations(range(devices), count):
                    moved = list(state)
                    for device in chosen:
                        load, heads = moved[device]
                        moved[device] = (round(load + weight / count, 9), heads + 1)
                    if max(moved)[0] >= target or max(h for _, h in moved) > slots:
                        continue
                    key = tuple(sorted(moved))
                    following[key] = min(following.get(key, copies), used + count - 1)
        states = following
    return bool(states)


def best_equal(weights: np.ndarray, devices: int, slots: int, copies: int) -> float:
    """The least fullest device of one layer with equal splits; infinite where nothing fits."""
    subsets = _subsets(devices)
    best = np.inf
    for placement in product(subsets, repeat=len(weights)):
        there = np.array(placement)
        if there.sum() - len(weights) <= copies and there.sum(0).max() <= slots:
            best = min(best, ((weights / there.sum(1)) @ there).max())
    return best


def best_proportional(weights: np.ndarray, devices: int, slots: int, copies: int) -> float:
    """The same with free shares: of a given placement the best is a flow, hence a cut.

    No shares do better than the densest set of heads, its weight over the devices it may use, and
    by the max-flow min-cut theorem some shares do as well.
    """
    subsets = _subsets(devices)
    groups = [
        np.array(group) for group in product((False, True), repeat=len(weights)) if any(group)
    ]
    best = np.inf
    for placement in product(subsets, repeat=len(weights)):
        there = np.array(placement)
        if there.sum() - len(weights) <= copies and there.sum(0).max() <= slots:
            densest = max(weights[group].sum() / there[group].any(0).sum() for group in groups)
            best = min(best, densest)
    return best


def _subsets(devices: int) -> list[tuple[bool, ...]]:
    return [subset for subset in product((False, True), repeat=devices) if any(subset)]
