"""Ragged decode attention for GPUs: Pallas kernels lowered through Triton.

Every piece (`pieces.py`) is one program. No list of pieces is stored: every program reads the
layer's lengths and finds its own piece among them, which costs less than a kernel that lists them.
A second kernel merges the pieces of a pair (`merge.py`).
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from fairkv_jax.pallas.ragged_decode.merge import NEVER, merge_pieces
from fairkv_jax.pallas.ragged_decode.page_table import PageTable
from fairkv_jax.pallas.ragged_decode.pieces import Pieces, Sizes, layer_index
from fairkv_jax.pallas.ragged_decode.reference import Pool
from fairkv_jax.pallas.ragged_decode.tiles import TritonTile
from fairkv_jax.pallas.ragged_decode.triton_blocks import launch, load, store
from fairkv_jax.shapes import next_power_of_two

_MIN_DOT = 16  # rows of a tensor core's operand

State = tuple[Array, Array, Array]
"""The running softmax: acc [16, H], m [16] and l [16], with a row per query head, padded."""


def ragged_decode(
    q: Float[Array, "B 1 C G H"],
    k_pages: Float[Array, "pages page_size H"],
    v_pages: Float[Array, "pages page_size H"],
    page_table: PageTable,
    lengths: Int[Array, "*L B C"],
    layer: Int[Array, ""] | int | None = None,
    *,
    tile: TritonTile,
    interpret: bool = False,
) -> Float[Array, "B 1 C G H"]:
    """Softmax attention of one query token per row over the row's cached tokens.

    Raises:
        NotImplementedError: The kernels cannot take this number of queries, type, group, head
            dimension or batch.
    """
    sizes, layer = Sizes.of(q, k_pages, page_table, tile), layer_index(layer)
    acc, m, l = launch(
        partial(_attend, sizes=sizes),
        "ragged_decode",
        sizes.pieces,
        _partials(sizes),
        **_pipeline(tile),
        interpret=interpret,
    )(_rows(q), _rows(k_pages), _rows(v_pages), *_lists(page_table, lengths), layer)
    return merge_pieces(q, acc, m, l, lengths, layer, sizes, interpret=interpret)


def append_and_decode(
    q: Float[Array, "B 1 C G H"],
    k: Float[Array, "B 1 C H"],
    v: Float[Array, "B 1 C H"],
    pool: Pool,
    page_table: PageTable,
    lengths: Int[Array, "*L B C"],
    layer: Int[Array, ""] | int | None = None,
    *,
    tile: TritonTile,
    interpret: bool = False,
) -> tuple[Float[Array, "B 1 C G H"], Pool]:
    """Writes each owned row's new key and value to its page, and attends over them too.

    `lengths` counts the tokens before the append; rows of length 0 are not owned. The pool is
    updated in place: the program with a pair's last piece takes the new token from its registers
    and stores it, and no other program reads that token's place.

    Raises:
        NotImplementedError: As `ragged_decode`.
    """
    sizes, layer = Sizes.of(q, pool[0], page_table, tile), layer_index(layer)
    flat = tuple(_rows(pages) for pages in pool)
    written = tuple(jax.ShapeDtypeStruct(pages.shape, pages.dtype) for pages in flat)
    acc, m, l, k_rows, v_rows = launch(
        partial(_append_and_attend, sizes=sizes),
        "append_and_decode",
        sizes.pieces,
        (*_partials(sizes), *written),
        **_pipeline(tile),
        interpret=interpret,
        input_output_aliases={1: 3, 2: 4},
    )(_rows(q), *flat, *_lists(page_table, lengths), layer, _rows(k), _rows(v))
    pool = k_rows.reshape(pool[0].shape), v_rows.reshape(pool[1].shape)
    out = merge_pieces(q, acc, m, l, lengths, layer, sizes, interpret=interpret)
    return out, pool


@dataclass(frozen=True)
class _Work:
    """The pair of a program's piece: its queries, and where its tokens lie."""

    sizes: Sizes
    k_ref: Any
    v_ref: Any
    pages_ref: Any
    pair: Array
    start: Array
    """Where the pair's entries begin in the list of pages."""
    length: Array
    q: Array

    def pool_rows(self, token: Array, mask: Array) -> Array:
        """The rows of the flat pool that hold the pair's tokens; reads are clipped to the list."""
        entry = jnp.clip(self._entry(token), 0, self.sizes.num_entries - 1)
        page = plt.load(self.pages_ref.at[entry], mask=mask, other=0)
        page_size = self.sizes.page_size
        return page * page_size + jax.lax.rem(token, jnp.int32(page_size))

    def has_page(self, token: Array) -> Array:
        """Whether the list reaches as far as the token's page."""
        return self._entry(token) < self.sizes.num_entries

    def _entry(self, token: Array) -> Array:
        return self.start + jax.lax.div(token, jnp.int32(self.sizes.page_size))


def _attend(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    pages_ref: Any,
    starts_ref: Any,
    lengths_ref: Any,
    layer_ref: Any,
    acc_ref: Any,
    m_ref: Any,
    l_ref: Any,
    *append: Any,
    sizes: Sizes,
) -> None:
    """Attends over one piece: an online softmax over its tiles, in base 2."""
    item = pl.program_id(0)
    pieces = Pieces.of(lengths_ref, layer_ref, sizes)
    piece = pieces.find(item)

    @pl.when(piece.begin < piece.end)
    def run() -> None:
        start = plt.load(starts_ref.at[pieces.offset + piece.pair])
        q = _load_queries(q_ref, piece.pair, sizes)
        work = _Work(sizes, k_ref, v_ref, pages_ref, piece.pair, start, piece.length, q)
        state = jax.lax.fori_loop(piece.begin, piece.end, partial(_tile, work=work), _start(sizes))
        if append:
            state = _append(state, piece.is_last, work, append)
        acc, m, l = state
        group = jnp.arange(_MIN_DOT)
        rows = item * sizes.group + group
        store(acc_ref, rows, acc, group < sizes.group, sizes.head_dim)
        plt.store(m_ref.at[rows], m, mask=group < sizes.group)
        plt.store(l_ref.at[rows], l, mask=group < sizes.group)


def _append_and_attend(*refs: Any, sizes: Sizes) -> None:
    """As `_attend`, with the new keys and values as inputs and the pool as outputs."""
    *inputs, k_new_ref, v_new_ref, acc_ref, m_ref, l_ref, k_out_ref, v_out_ref = refs
    append = (k_new_ref, v_new_ref, k_out_ref, v_out_ref)
    _attend(*inputs, acc_ref, m_ref, l_ref, *append, sizes=sizes)


def _tile(i: Array, state: State, *, work: _Work) -> State:
    """Adds the tokens of tile i; tokens past the length are not read."""
    acc, m, l = state
    sizes = work.sizes
    token = i * sizes.tile.block_tokens + jnp.arange(sizes.tile.block_tokens)
    is_token = token < work.length
    row = work.pool_rows(token, is_token)
    k = load(work.k_ref, row, is_token, sizes.head_dim)
    v = load(work.v_ref, row, is_token, sizes.head_dim)
    scores = _dot(work.q, k, trans_b=True) * _scale(sizes)
    scores = jnp.where(is_token[None, :], scores, NEVER)
    new_m = jnp.maximum(m, jnp.max(scores, axis=1))
    weights = jnp.exp2(scores - new_m[:, None])
    decay = jnp.exp2(m - new_m)
    acc = acc * decay[:, None] + _dot(weights.astype(v.dtype), v)
    return acc, new_m, l * decay + jnp.sum(weights, axis=1)


def _append(state: State, is_last: Array, work: _Work, append: tuple[Any, ...]) -> State:
    """Adds the new token to a pair's last piece, and stores its key and value."""
    acc, m, l = state
    sizes, (k_new_ref, v_new_ref, k_out_ref, v_out_ref) = work.sizes, append
    one = jnp.zeros(1, jnp.int32)
    mask = jnp.broadcast_to(is_last, (1,))
    k = load(k_new_ref, one + work.pair, mask, sizes.head_dim)
    v = load(v_new_ref, one + work.pair, mask, sizes.head_dim)
    token = one + work.length
    is_stored = mask & work.has_page(token)
    row = work.pool_rows(token, is_stored)
    store(k_out_ref, row, k, is_stored, sizes.head_dim)
    store(v_out_ref, row, v, is_stored, sizes.head_dim)
    score = jnp.sum(work.q.astype(jnp.float32) * k.astype(jnp.float32), axis=1) * _scale(sizes)
    score = jnp.where(is_last, score, NEVER)
    new_m = jnp.maximum(m, score)
    weight, decay = jnp.exp2(score - new_m), jnp.exp2(m - new_m)
    acc = acc * decay[:, None] + weight[:, None] * v.astype(jnp.float32)
    return acc, new_m, l * decay + weight


def _pipeline(tile: TritonTile) -> dict[str, int]:
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages}


def _partials(sizes: Sizes) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The outputs `acc`, `m` and `l`, with a row per piece and query head."""
    rows = sizes.pieces * sizes.group
    scalar = jax.ShapeDtypeStruct((rows,), jnp.float32)
    return jax.ShapeDtypeStruct((rows, sizes.head_dim), jnp.float32), scalar, scalar


def _start(sizes: Sizes) -> State:
    return (
        jnp.zeros((_MIN_DOT, next_power_of_two(sizes.head_dim)), jnp.float32),
        jnp.full((_MIN_DOT,), NEVER, jnp.float32),
        jnp.zeros((_MIN_DOT,), jnp.float32),
    )


def _load_queries(q_ref: Any, pair: Array, sizes: Sizes) -> Array:
    """The group's queries, padded with zeros to what the tensor cores take."""
    group = jnp.arange(_MIN_DOT)
    return load(q_ref, pair * sizes.group + group, group < sizes.group, sizes.head_dim)


def _dot(a: Array, b: Array, trans_b: bool = False) -> Array:
    """A product summed in float32; float32 operands are not rounded to tf32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return plt.dot(a, b, trans_b=trans_b, precision=precision)


def _scale(sizes: Sizes) -> float:
    return sizes.head_dim**-0.5 * math.log2(math.e)


def _lists(page_table: PageTable, lengths: Int[Array, "*L B C"]) -> tuple[Array, Array, Array]:
    return page_table.pages, page_table.starts.reshape(-1), lengths.reshape(-1)


def _rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])
