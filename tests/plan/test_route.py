"""The routing rule against the same rule written as loops."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairkv_jax.plan import route


def _route_by_loops(replicas: np.ndarray, lengths: np.ndarray, load: np.ndarray) -> np.ndarray:
    load = load.astype(float)
    num_layers, num_heads, devices = replicas.shape
    owner = np.zeros((num_layers, num_heads), int)
    for layer in range(num_layers):
        for head in range(num_heads):
            if replicas[layer, head].sum() == 1:
                owner[layer, head] = replicas[layer, head].argmax()
                load[layer, owner[layer, head]] += lengths[layer, head]
    ranked = [
        sorted(
            (head for head in range(num_heads) if replicas[layer, head].sum() > 1),
            key=lambda head, layer=layer: (-lengths[layer, head], head),
        )
        for layer in range(num_layers)
    ]
    for rank in range(num_heads):
        total = load.sum(0)
        for layer, heads in enumerate(ranked):
            if rank < len(heads):
                head = heads[rank]
                _, _, device = min(
                    (load[layer, p], total[p], p)
                    for p in range(devices)
                    if replicas[layer, head, p]
                )
                owner[layer, head] = device
                load[layer, device] += lengths[layer, head]
    return owner


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), devices=st.integers(1, 4), heads=st.integers(1, 5))
def test_follows_the_rule(seed, devices, heads):
    rng = np.random.default_rng(seed)
    replicas = rng.random((3, heads, devices)) < 0.5
    replicas[..., 0] |= ~replicas.any(2)
    # Few different lengths and loads, so that ties are common.
    lengths, load = rng.integers(0, 4, (3, heads)), rng.integers(0, 3, (3, devices))
    before = load.copy()
    owner = route(replicas, lengths, load)
    assert owner.dtype == np.int32
    assert (owner == _route_by_loops(replicas, lengths, load)).all()
    assert np.take_along_axis(replicas, owner[..., None], 2).all()
    assert (load == before).all()


def test_a_head_without_a_replica_is_named():
    replicas = np.ones((2, 2, 2), bool)
    replicas[1, 0] = False
    with pytest.raises(ValueError, match="head 0 of layer 1 has no replica"):
        route(replicas, np.ones((2, 2)), np.zeros((2, 2)))


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="do not fit"):
        route(np.ones((2, 2, 2), bool), np.ones((2, 3)), np.zeros((2, 2)))
