"""The pages of the KV cache, in floating point or in int8, and how tokens are written to them.

An int8 page has one scale per token for keys and one for values, each the largest element / 127:

    key[t, h]  =  k_pages[page, t, h] * k_scales[page, t]

A token's values and its scale depend on this token alone. Appending one therefore never rewrites
what is in its page already, and the same token has the same bytes on every device.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8, Num

from fairkv_jax.kv_cache_spec import SCALE_DTYPE

Scales = tuple[Float[Array, "pages page_size"], Float[Array, "pages page_size"]]
"""The scales of keys and of values."""
_LARGEST = 127


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pool:
    """The pages of one device, or of all devices together."""

    k_pages: Num[Array, "pages page_size H"]
    v_pages: Num[Array, "pages page_size H"]
    scales: Scales | None = None
    """None where the pages hold floating-point numbers."""

    def write(
        self,
        page: Int[Array, "*n"],
        token: Int[Array, "*n"],
        k: Float[Array, "*n H"],
        v: Float[Array, "*n H"],
    ) -> "Pool":
        """The pool with keys and values at these places; a page past the end is left out."""

        def put(pages: Array, new: Array) -> Array:
            return pages.at[page, token].set(new, mode="drop")

        return jax.tree.map(put, self, tokens_of(k, v, self))

    def read(
        self, pages: Int[Array, "*n"], dtype: jnp.dtype
    ) -> tuple[Float[Array, "*n page_size H"], Float[Array, "*n page_size H"]]:
        """The keys and values of whole pages, those of int8 pages as numbers of that type."""
        k, v = self.k_pages[pages], self.v_pages[pages]
        if self.scales is None:
            return k, v
        k_scales, v_scales = (scales[pages][..., None] for scales in self.scales)
        return dequantize(k, k_scales).astype(dtype), dequantize(v, v_scales).astype(dtype)

    def copy(self, source: Int[Array, "n"], target: Int[Array, "n"]) -> "Pool":
        """The pool with pages copied; a target past the end is left out."""
        return jax.tree.map(lambda x: x.at[target].set(x[source], mode="drop"), self)

    def exchange(self, source: Int[Array, "n"], target: Int[Array, "n"], axis: str) -> "Pool":
        """The pool with pages copied from other devices, inside `shard_map`.

        At each place, one device has a source, and one a target; those of the others are past the
        end.
        """

        def put(x: Array) -> Array:
            sent = x.at[source].get(mode="fill", fill_value=0)
            return x.at[target].set(jax.lax.psum(sent, axis), mode="drop")

        return jax.tree.map(put, self)


def tokens_of(k: Float[Array, "*n H"], v: Float[Array, "*n H"], pool: Pool) -> Pool:
    """Keys and values in the type of the pool's pages: [*n, H], and scales [*n]."""
    if pool.scales is None:
        return Pool(k, v)
    (k_values, k_scales), (v_values, v_scales) = quantize(k), quantize(v)
    return Pool(k_values, v_values, (k_scales, v_scales))


def dequantize(values: Int8[Array, "*n"], scales: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """The numbers in float32 that int8 values stand for; the scales are broadcast."""
    return values.astype(jnp.float32) * scales.astype(jnp.float32)


def rounded_to_int8(x: Float[Array, "*n H"]) -> Float[Array, "*n H"]:
    """The vectors as int8 pages hold them, in their own type.

    In float32 they are exact, and rounding them again changes nothing: the largest element of the
    int8 values is always 127.
    """
    values, scales = quantize(x)
    return dequantize(values, scales[..., None]).astype(x.dtype)


def quantize(x: Float[Array, "*n H"]) -> tuple[Int8[Array, "*n H"], Float[Array, "*n"]]:
    """Rounds vectors to int8, each with a scale of its own; a vector of zeros has scale 0.

    The scale is rounded to bfloat16 first, and the vector is divided by the rounded one. The
    largest element then becomes at most 127 * (1 + 2^-8) < 127.5, which still rounds to 127. So no
    element is off by more than half a scale, as with a scale in float32, and the scale itself is
    larger by at most 0.4 %.
    """
    wide = x.astype(jnp.float32)
    scales = (jnp.abs(wide).max(-1) / _LARGEST).astype(SCALE_DTYPE)
    divisor = jnp.where(scales == 0, 1, scales.astype(jnp.float32))
    values = jnp.round(wide / divisor[..., None])
    return jnp.clip(values, -_LARGEST, _LARGEST).astype(jnp.int8), scales
