"""How the cached tokens of all (row, slot) pairs are cut into pieces of nearly equal size.

Equal pieces keep every multiprocessor busy when the lengths differ. With 2 tiles a piece:

    lengths, in tiles   pair 0: 5       pair 1: 0   pair 2: 3
    pieces              [0,0..1] [0,1..3] [0,3..5]  [2,0..1] [2,1..3]       one program each

A piece writes its unnormalised output `acc`, its maximum score `m` and its sum of weights `l`;
`merge.py` merges the pieces of a pair. `Pieces` and `Piece` are used inside kernels that are
lowered through Triton.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Int

from fairkv_jax.kv_cache_spec import INT8
from fairkv_jax.pallas.ragged_decode.page_table import PageTable
from fairkv_jax.pallas.ragged_decode.tiles import Tile
from fairkv_jax.pallas.ragged_decode.triton_blocks import ceil_div, launch
from fairkv_jax.shapes import next_power_of_two

DTYPES = ("bfloat16", "float16", "float32")
MAX_GROUP = 16
MAX_HEAD_DIM = 256
MAX_PAIRS = 8192
_LIST_ELEMENTS = 8192
_MANY_PAIRS = 4096
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class Sizes:
    """The sizes that the kernels are compiled for."""

    pairs: int
    group: int
    head_dim: int
    page_size: int
    num_entries: int
    """Entries of the page table's list."""
    tile: Tile

    @classmethod
    def of(cls, q: Array, k_pages: Array, page_table: PageTable, tile: Tile) -> "Sizes":
        """Raises NotImplementedError where no kernel takes these arrays."""
        batch, num_queries, slots, group, head_dim = q.shape
        page_size, num_entries = k_pages.shape[1], page_table.num_entries
        sizes = cls(batch * slots, group, head_dim, page_size, num_entries, tile)
        if num_queries != 1:
            raise NotImplementedError(f"{num_queries} query tokens per row: the kernels take 1")
        if q.dtype.name not in DTYPES or k_pages.dtype.name not in (q.dtype.name, INT8):
            raise NotImplementedError(f"queries of {q.dtype} over pages of {k_pages.dtype}")
        if group > MAX_GROUP:
            raise NotImplementedError(f"{group} query heads per KV head, at most {MAX_GROUP}")
        if head_dim > MAX_HEAD_DIM or head_dim % 16:
            raise NotImplementedError(
                f"head_dim {head_dim}: it must be a multiple of 16, at most {MAX_HEAD_DIM}"
            )
        if sizes.pairs > MAX_PAIRS:
            raise NotImplementedError(f"{sizes.pairs} (row, slot) pairs, at most {MAX_PAIRS}")
        return sizes

    @property
    def max_tokens(self) -> int:
        """The most tokens of one pair: all entries of the list may be its own."""
        return min(self.num_entries * self.page_size, _INT32_MAX)

    def num_warps(self, usual: int = 4) -> int:
        """Warps of a program that holds every pair in its registers.

        Beyond 4,096 pairs there are twice as many, because the usual number would spill.
        """
        return usual * (2 if self.pairs > _MANY_PAIRS else 1)

    @property
    def pieces(self) -> int:
        """The most pieces there can be: every pair may add one that is not full."""
        least = self.tile.block_tokens * self.tile.min_blocks
        return min(self.tile.programs + self.pairs, self.pairs * pl.cdiv(self.max_tokens, least))


@dataclass(frozen=True)
class Piece:
    """One program's work, or a vector of many; past the last piece, `begin` equals `end`."""

    pair: Array
    length: Array
    """Tokens of the pair."""
    begin: Array
    end: Array
    """The first tile of the piece and the first one after it."""
    is_last: Array
    """Whether the piece ends its pair."""


@dataclass(frozen=True)
class Pieces:
    """All pieces of a layer, as vectors over the pairs that are padded to a power of 2."""

    offset: Array
    """Where the layer's pairs begin in the arrays of all layers."""
    lengths: Array
    tiles: Array
    counts: Array
    ends: Array

    @classmethod
    def of(cls, lengths_ref: Any, layer_ref: Any, sizes: Sizes) -> "Pieces":
        pair = jnp.arange(next_power_of_two(sizes.pairs))
        offset = layer_ref[0] * sizes.pairs
        lengths = plt.load(lengths_ref.at[offset + pair], mask=pair < sizes.pairs, other=0)
        # No pair can have more than the list does, which bounds the number of pieces.
        lengths = jnp.minimum(lengths, sizes.max_tokens)
        tiles = ceil_div(lengths, sizes.tile.block_tokens)
        share = ceil_div(jnp.sum(tiles), sizes.tile.programs)
        counts = ceil_div(tiles, jnp.maximum(share, sizes.tile.min_blocks))
        return cls(offset, lengths, tiles, counts, jnp.cumsum(counts))

    def find(self, item: Array) -> Piece:
        """The piece at index `item` of the list, which may be a vector."""
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
        """The index of a pair's first piece, and how many pieces it has."""
        count = self.pick(self.counts, pair)
        return self.pick(self.ends, pair) - count, count

    def pick(self, values: Array, pair: Array) -> Array:
        """values[pair], as a sum, because Triton cannot index what lies in registers."""
        at = jnp.arange(values.shape[0]) == pair[..., None]
        return jnp.sum(jnp.where(at, values, 0), axis=-1)


def layer_index(layer: Int[Array, ""] | int | None) -> Int[Array, "1"]:
    """The layer as an array that kernels read; arrays without a layer axis are those of layer 0."""
    return jnp.asarray(0 if layer is None else layer, jnp.int32).reshape(1)


def list_pieces(
    lengths: Int[Array, "*L B C"],
    starts: Int[Array, "*L B C"],
    layer: Int[Array, "1"],
    sizes: Sizes,
    *,
    interpret: bool = False,
) -> Int[Array, "pieces 5"]:
    """Every piece's pair, first tile, end, length and page-table start, by a kernel of its own."""
    block = max(1, _LIST_ELEMENTS // next_power_of_two(sizes.pairs))

    def write(lengths_ref: Any, starts_ref: Any, layer_ref: Any, list_ref: Any) -> None:
        item = pl.program_id(0) * block + jnp.arange(block)
        pieces = Pieces.of(lengths_ref, layer_ref, sizes)
        piece = pieces.find(item)
        is_pair = piece.pair < sizes.pairs
        start = plt.load(starts_ref.at[pieces.offset + piece.pair], mask=is_pair, other=0)
        fields = (piece.pair, piece.begin, piece.end, piece.length, start)
        for at, field in enumerate(fields):
            column = jnp.full(block, at)
            plt.store(list_ref.at[item, column], field, mask=item < sizes.pieces)

    shape = jax.ShapeDtypeStruct((sizes.pieces, 5), jnp.int32)
    programs = pl.cdiv(sizes.pieces, block)
    kernel = launch(
        write,
        "list_pieces",
        programs,
        (shape,),
        num_warps=sizes.num_warps(),
        interpret=interpret,
    )
    return kernel(lengths.reshape(-1), starts.reshape(-1), layer)[0]
