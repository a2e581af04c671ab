"""How tokens are rounded to int8, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fairkv_jax.pallas.ragged_decode.pool import quantize, rounded_to_int8
from tests.pallas import oracle


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    """Vectors of many sizes: of zeros, too small for a scale, with a single large element."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2000, 64)) * 10.0 ** rng.uniform(-30, 30, (2000, 1))
    x[0], x[1] = 0, 1e-44
    x[2:100, 5] *= 1e4
    return x.astype(np.float32)


def test_int8_values_and_scales_are_the_formulas(vectors: np.ndarray):
    values, scales = (np.asarray(part) for part in jax.jit(quantize)(vectors))
    normal = np.arange(len(vectors)) != 1  # XLA takes what is below 1e-38 for 0
    for got, want in zip((values, scales), oracle.quantize(vectors), strict=True):
        np.testing.assert_array_equal(got[normal], want[normal])
    assert not values[:2].any()
    wide = scales.astype(np.float64)[:, None]
    assert (np.abs(values * wide - vectors) <= wide * 0.5 + 1e-37).all()
    # The stored scale is that of float32 but for its rounding.
    largest = np.abs(vectors[2:]).max(1) / 127
    np.testing.assert_allclose(scales[2:].astype(np.float32), largest, rtol=2**-8)


def test_rounding_twice_changes_nothing(vectors: np.ndarray):
    """Prefill rounds tokens, and the insert into pages rounds them again."""
    once = jax.jit(rounded_to_int8)(vectors)
    np.testing.assert_array_equal(jax.jit(rounded_to_int8)(once), once)
    for first, again in zip(quantize(jnp.asarray(vectors)), quantize(once), strict=True):
        np.testing.assert_array_equal(np.asarray(first), np.asarray(again))
