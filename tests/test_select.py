"""Selection without a sort, against NumPy's stable sort."""

from typing import Any

import jax
import numpy as np
import pytest

from fairkv_jax import select

keep_top: Any = jax.jit(select.keep_top)
keep_mass: Any = jax.jit(select.keep_mass)


def rows(kind: str) -> np.ndarray:
    """[24, 40] float32."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((24, 40)).astype(np.float32)
    if kind == "ties":
        return np.round(values) + np.float32(0)  # no negative zeros
    if kind == "infinite":
        values[rng.random(values.shape) < 0.4] = -np.inf
        values[rng.random(values.shape) < 0.1] = np.inf
    if kind == "close":  # neighbouring floats on both sides of zero, and denormals
        return (rng.integers(-5, 6, values.shape) * np.float32(1e-45)).astype(np.float32)
    if kind == "equal":
        return np.full_like(values, 0.25)
    return values


KINDS = ("random", "ties", "infinite", "close", "equal")


@pytest.mark.parametrize("kind", KINDS)
def test_keep_top(kind: str):
    """Any k of each row, 0 and all included; of equal values the one of lower index."""
    values = rows(kind)
    k = np.random.default_rng(1).integers(0, 41, 24).astype(np.int32)
    k[:4] = 0, 1, 39, 40
    kept = np.asarray(keep_top(values, k))
    for row, size, mask in zip(values, k, kept, strict=True):
        want = np.sort(np.argsort(-row, kind="stable")[:size])
        np.testing.assert_array_equal(np.flatnonzero(mask), want)


def test_keep_top_of_more_than_there_are_keeps_all():
    assert np.asarray(keep_top(rows("random")[0], np.int32(99))).all()


def test_keep_top_of_a_negative_number_keeps_none():
    assert not np.asarray(keep_top(rows("random")[0], np.int32(-3))).any()


def test_negative_zero_is_below_zero():
    """The only pair that is equal as floats and not as bits; scores are never negative."""
    kept = keep_top(np.array([-0.0, 0.0], np.float32), np.int32(1))
    assert np.asarray(kept).tolist() == [False, True]


@pytest.mark.parametrize("kind", ["random", "ties", "infinite"])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_keep_mass(kind: str, fraction: float):
    """The fewest largest whose weights reach the mass, with all that equal the smallest kept."""
    values = rows(kind)
    weights = np.random.default_rng(2).integers(0, 5, values.shape).astype(np.int32)
    mass = np.ceil(fraction * weights.sum(1)).astype(np.int32)
    kept = np.asarray(keep_mass(values, weights, mass))
    for row, weight, least, mask in zip(values, weights, mass, kept, strict=True):
        levels = np.unique(row)[::-1]
        enough = [level for level in levels if weight[row >= level].sum() >= least]
        if least == 0:  # no value is needed, so the threshold lies above all of them
            assert not mask.any()
        else:
            np.testing.assert_array_equal(mask, row >= enough[0])


def test_keep_mass_with_unit_weights_counts():
    values = np.array([3, 1, 2, 2, 0], np.float32)
    kept = [np.asarray(keep_mass(values, np.ones(5, np.int32), np.int32(k))) for k in (1, 2, 4)]
    assert [mask.tolist() for mask in kept] == [
        [True, False, False, False, False],
        [True, False, True, True, False],
        [True, True, True, True, False],
    ]
