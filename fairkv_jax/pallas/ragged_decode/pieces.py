"""How the cached tokens of all (row, slot) pairs are cut into pieces of nearly equal size.

Pairs of very different length then keep every multiprocessor busy. With 2 tiles a piece:

    lengths, in tiles   pair 0: 5       pair 1: 0   pair 2: 3
    pieces              [0,0..1] [0,1..3] [0,3..5]  [2,0..1] [2,1..3]       one program each

A piece leaves its unnormalised output, peak and mass, and `merge.py` puts a pair's pieces together.
`Pieces` and `Piece` live inside kernels lowered through Triton.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Int

from fairkv_jax.pallas.ragged_decode.tiles import Tile
from fairkv_jax.pallas.ragged_decode.triton_blocks import ceil_div, launch, power_of_two

DTYPES = ("bfloat16", "float16", "float32")
MAX_GROUP = 16
MAX_WIDTH = 256
MAX_PAIRS = 8192
_LIST_ELEMENTS = 8192


@dataclass(frozen=True)
class Sizes:
    """What the kernels know when they are compiled."""

    pairs: int
    group: int
    width: int
    page_size: int
    max_pages: int
    tile: Tile

    @classmethod
    def of(cls, q: Array, k_pages: Array, page_table: Array, tile: Tile) -> "Sizes":
        """Raises NotImplementedError where no kernel takes these arrays."""
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
class Piece:
    """One program's work, or a vector of many; past the last one, `begin` is `end`."""

    pair: Array
    length: Array
    """Of the pair, in tokens."""
    begin: Array
    end: Array
    """Tiles of the pair, the last one excluded."""
    is_last: Array
    """Whether it ends the pair."""


@dataclass(frozen=True)
class Pieces:
    """All of them: vectors over the pairs, padded to a power of 2."""

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

    def find(self, item: Array) -> Piece:
        """The piece at a place of the list, or those at a vector of places."""
        pair = jnp.sum((self.ends <= item[..., None]).astype(jnp.int32), axis=-1)
        tiles, count = self.pick(self.tiles, pair), self.pick(self.counts, pair)
        piece = item - (self.pick(self.ends, pair) - count)
        # Past the last piece count and tiles are 0.
        divisor = jnp.maximum(count, 1)
        return Piece(
            pair,
            self.pick(self.lengths, pair),
            jax.lax.div(piece * tiles, divisor),
            jax.lax.div((piece + 1) * tiles, divisor),
            piece == count - 1,
        )

    def span(self, pair: Array) -> tuple[Array, Array]:
        """A pair's first place in the list and how many it has."""
        count = self.pick(self.counts, pair)
        return self.pick(self.ends, pair) - count, count

    def pick(self, values: Array, pair: Array) -> Array:
        """values[pair]; a sum, because Triton has no indexing of what lies in registers."""
        at = jnp.arange(values.shape[0]) == pair[..., None]
        return jnp.sum(jnp.where(at, values, 0), axis=-1)


def list_pieces(
    lengths: Int[Array, "B C"], sizes: Sizes, *, interpret: bool = False
) -> Int[Array, "pieces 4"]:
    """Every piece's pair, first tile, end and length, by a kernel of its own."""
    block = max(1, _LIST_ELEMENTS // power_of_two(sizes.pairs))

    def write(lengths_ref: Any, list_ref: Any) -> None:
        item = pl.program_id(0) * block + jnp.arange(block)
        piece = Pieces.of(lengths_ref, sizes).find(item)
        fields = (piece.pair, piece.begin, piece.end, piece.length)
        for at, field in enumerate(fields):
            column = jnp.full(block, at)
            plt.store(list_ref.at[item, column], field, mask=item < sizes.pieces)

    shape = jax.ShapeDtypeStruct((sizes.pieces, 4), jnp.int32)
    programs = pl.cdiv(sizes.pieces, block)
    kernel = launch(write, "list_pieces", programs, (shape,), interpret=interpret)
    return kernel(lengths.reshape(-1))[0]
