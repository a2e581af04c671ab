"""The routing rule against the same rule written as loops."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairkv_jax.plan import route, route_beyond


def _route_by_loops(replicas: np.ndarray, lengths: np.ndarray, load: np.ndarray) -> np.ndarray:
    load = load.astype(float)
    num_layers, num_heads, _ = replicas.shape
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
        due = []
        for layer, heads in enumerate(ranked):
            if rank < len(heads):
                there = np.flatnonzero(replicas[layer, heads[rank]])
                least = load[layer, there].min()
                due.append((layer, heads[rank], [p for p in there if load[layer, p] == least]))
        for layer, head, tied in sorted(due, key=lambda each: len(each[2]) > 1):
            device = min(tied, key=lambda p: (load[:, p].sum(), p))
            owner[layer, head] = device
            load[layer, device] += lengths[layer, head]
    return owner


@settings(max_examples=60)
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


def test_the_copied_heads_of_an_empty_cache_are_spread():
    """Every layer has a tie, and no layer's time depends on it; memory does."""
    replicas = np.zeros((12, 3, 2), bool)
    replicas[:, 0, 0] = replicas[:, 1, 1] = replicas[:, 2] = True
    owner = route(replicas, np.full((12, 3), 7), np.zeros((12, 2)))
    assert np.bincount(owner.ravel()).tolist() == [18, 18]


def test_a_head_without_a_replica_is_named():
    replicas = np.ones((2, 2, 2), bool)
    replicas[1, 0] = False
    with pytest.raises(ValueError, match="head 0 of layer 1 has no replica"):
        route(replicas, np.ones((2, 2)), np.zeros((2, 2)))


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="do not fit"):
        route(np.ones((2, 2, 2), bool), np.ones((2, 3)), np.zeros((2, 2)))


@given(st.integers(0, 2**32 - 1))
def test_a_document_is_copied_where_that_makes_the_fullest_device_lighter(seed: int):
    """Otherwise the row is served where the document lies."""
    rng = np.random.default_rng(seed)
    replicas = rng.random((3, 5, 4)) < 0.5
    replicas[..., 0] |= ~replicas.any(-1)
    holders = replicas & (rng.random(replicas.shape) < 0.6)
    only = np.arange(4) == replicas.argmax(-1)[..., None]
    holders |= only & ~holders.any(-1, keepdims=True)
    lengths, load = rng.integers(1, 50, (3, 5)), rng.integers(0, 200, (3, 4))

    def peak(owner: np.ndarray) -> float:
        after = load.copy()
        for layer, head in np.ndindex(owner.shape):
            after[layer, owner[layer, head]] += lengths[layer, head]
        return after.max(1).sum()

    within, beyond = route(holders, lengths, load), route(replicas, lengths, load)
    chosen = route_beyond(replicas, holders, lengths, load)
    is_better = peak(within) > 1.05 * peak(beyond)
    np.testing.assert_array_equal(chosen, beyond if is_better else within)
