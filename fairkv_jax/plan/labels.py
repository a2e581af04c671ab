"""Balances memory: which of the interchangeable devices is which, layer by layer."""

import numpy as np

MAX_PASSES = 20


def balance_labels(load: np.ndarray) -> np.ndarray:
    """Permutes the devices of every layer so that no device is always the fullest.

    The step time sees only each layer's fullest device, so labels are free. The most uneven
    layers are placed first, heaviest device onto the lightest total; then each layer in turn is
    taken out and put back the same way until nothing improves.

    Args:
        load: [L, P] cached tokens of one row.

    Returns:
        labels: int [L, P]; what was device p of layer l becomes device labels[l, p].
    """
    num_layers, devices = load.shape
    labels = np.tile(np.arange(devices), (num_layers, 1))
    total = np.zeros(devices)
    for layer in np.argsort(load.min(1) - load.max(1), kind="stable"):
        labels[layer] = _opposite(load[layer], total)
        total[labels[layer]] += load[layer]
    for _ in range(MAX_PASSES):
        before = total.max()
        for layer in range(num_layers):
            rest = total.copy()
            rest[labels[layer]] -= load[layer]
            trial = _opposite(load[layer], rest)
            filled = rest.copy()
            filled[trial] += load[layer]
            if filled.max() < total.max() * (1 - 1e-12):
                labels[layer], total = trial, filled
        if total.max() >= before:
            break
    return labels


def _opposite(load: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Labels that put the heaviest of `load` [P] onto the lightest of `total` [P], and so on."""
    labels = np.empty(len(load), int)
    labels[np.argsort(-load, kind="stable")] = np.argsort(total, kind="stable")
    return labels
