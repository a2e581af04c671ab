"""What the Triton-style kernels share: how work is cut into pieces, and how blocks are read.

Everything here but `Sizes` runs inside a kernel.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array

from fairkv_jax.pallas.ragged_decode.tiles import TritonTile

DTYPES = ("bfloat16", "float16", "float32")
MAX_GROUP = 16
MAX_WIDTH = 256
MAX_PAIRS = 8192


@dataclass(frozen=True)
class Sizes:
    """What both kernels know when they are compiled."""

    pairs: int
    group: int
    width: int
    page_size: int
    max_pages: int
    tile: TritonTile

    @classmethod
    def of(cls, q: Array, k_pages: Array, page_table: Array, tile: TritonTile) -> "Sizes":
        """Raises NotImplementedError where the kernels cannot take these arrays."""
        batch, slots, group, width = q.shape
        sizes = cls(batch * slots, group, width, k_pages.shape[1], page_table.shape[-1], tile)
        if q.dtype.name not in DTYPES or k_pages.dtype != q.dtype:
            raise NotImplementedError(f"queries of {q.dtype} over pages of {k_pages.dtype}")
        if group > MAX_GROUP:
            raise NotImplementedError(f"{group} query heads a KV head, at most {MAX_GROUP}")
        if width > MAX_WIDTH or width % 16:
            raise NotImplementedError(f"head width {width}")
        if sizes.pairs > MAX_PAIRS:
            raise NotImplementedError(f"{sizes.pairs} (row, slot) pairs, at most {MAX_PAIRS}")
        return sizes

    @property
    def pieces(self) -> int:
        """The most pieces there can be: every pair may add one that is not full."""
        tokens = self.max_pages * self.page_size
        least = self.tile.block_tokens * self.tile.min_blocks
        return min(self.tile.programs + self.pairs, self.pairs * pl.cdiv(tokens, least))


@dataclass(frozen=True)
class Pieces:
    """The pieces of all pairs, inside a kernel: vectors over the pairs, padded to a power of 2."""

    lengths: Array
    tiles: Array
    counts: Array
    ends: Array

    @classmethod
    def of(cls, lengths_ref: Any, sizes: Sizes) -> "Pieces":
        pair = jnp.arange(power_of_two(sizes.pairs))
        lengths = plt.load(lengths_ref.at[pair], mask=pair < sizes.pairs, other=0)
        tiles = ceil_div(lengths, sizes.tile.block_tokens)
        share = ceil_div(jnp.sum(tiles), sizes.tile.programs)
        counts = ceil_div(tiles, jnp.maximum(share, sizes.tile.min_blocks))
        return cls(lengths, tiles, counts, jnp.cumsum(counts))

    def pick(self, values: Array, pair: Array) -> Array:
        """values[pair]; a sum, because Triton has no indexing of what lies in registers."""
        return jnp.sum(jnp.where(jnp.arange(values.shape[0]) == pair, values, 0))


def token_row(table_ref: Any, pair: Array, token: Array, mask: Array, sizes: Sizes) -> Array:
    """The rows of the flat pool that hold a pair's tokens."""
    at = pair * sizes.max_pages + jax.lax.div(token, jnp.int32(sizes.page_size))
    page = plt.load(table_ref.at[at], mask=mask, other=0)
    return page * sizes.page_size + jax.lax.rem(token, jnp.int32(sizes.page_size))


def load(ref: Any, rows: Array, mask: Array, width: int) -> Array:
    """ref[rows], zeros where the mask is false or a padded column lies."""
    at, mask = _columns(ref, rows, mask, width)
    return plt.load(at, mask=mask, other=0)


def store(ref: Any, rows: Array, value: Array, mask: Array, width: int) -> None:
    at, mask = _columns(ref, rows, mask, width)
    plt.store(at, value, mask=mask)


def _columns(ref: Any, rows: Array, mask: Array, width: int) -> tuple[Any, Array]:
    """Rows with all their columns; Triton's blocks are powers of 2, so a width of 96 takes 128."""
    shape = (*rows.shape, power_of_two(width))
    column = jnp.broadcast_to(jnp.arange(shape[-1]), shape)
    mask = jnp.broadcast_to(mask[..., None], shape)
    if shape[-1] > width:
        mask &= column < width
    return ref.at[jnp.broadcast_to(rows[..., None], shape), column], mask


def ceil_div(a: Array, b: Array | int) -> Array:
    b = jnp.asarray(b, jnp.int32)
    return jax.lax.div(a + b - 1, jnp.broadcast_to(b, jnp.shape(a)))


def power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
