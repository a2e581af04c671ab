"""Exact selection of the largest values without a sort: a binary search over their bits.

The order of IEEE floats is the order of their bits as integers, so the k-th largest value is
found in 32 counts. `k` may be an array, which `jax.lax.top_k` does not allow.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

_SIGN = np.uint32(1 << 31)


def keep_top(values: Float[Array, "*rows n"], k: Int[Array, "*rows"]) -> Bool[Array, "*rows n"]:
    """Marks the k largest values of each row; among equal ones those of lower index."""
    bits = _ordered_bits(values)
    ones = jnp.ones_like(bits, jnp.int32)
    threshold = _threshold(bits, ones, k)[..., None]
    above = bits > threshold
    level = bits == threshold
    room = k[..., None] - jnp.sum(above, -1, keepdims=True)
    return above | (level & (jnp.cumsum(level, -1) <= room))


def keep_mass(
    values: Float[Array, "*rows n"], weights: Array, mass: Array
) -> Bool[Array, "*rows n"]:
    """Marks the fewest largest values of each row whose weights sum to at least `mass`.

    Values equal to the smallest one kept are kept as well.
    """
    bits = _ordered_bits(values)
    return bits >= _threshold(bits, weights, mass)[..., None]


def _ordered_bits(values: Float[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Unsigned integers in the order of the floats."""
    bits = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.uint32)
    return jnp.where(bits >= _SIGN, ~bits, bits | _SIGN)


def _threshold(bits: Array, weights: Array, mass: Array) -> UInt32[Array, "*rows"]:
    """The largest t of each row such that the weights where bits >= t sum to `mass` or more."""

    def try_bit(i: Array, threshold: Array) -> Array:
        trial = threshold | (_SIGN >> i.astype(jnp.uint32))
        total = jnp.sum(jnp.where(bits >= trial[..., None], weights, 0), -1)
        return jnp.where(total >= mass, trial, threshold)

    return jax.lax.fori_loop(0, 32, try_bit, jnp.zeros(bits.shape[:-1], jnp.uint32))
