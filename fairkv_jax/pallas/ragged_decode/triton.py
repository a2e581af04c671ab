"""Ragged decode attention for GPUs: Pallas kernels lowered through Triton.

One program a piece (`pieces.py`). No list of them is stored: every program reads the lengths and
finds its own piece among them, which is cheaper than another kernel in front. A second kernel
merges the pieces of a pair (`merge.py`).
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from fairkv_jax.pallas.ragged_decode.merge import NEVER, merge_pieces
from fairkv_jax.pallas.ragged_decode.pieces import Pieces, Sizes
from fairkv_jax.pallas.ragged_decode.reference import Pool
from fairkv_jax.pallas.ragged_decode.tiles import TritonTile
from fairkv_jax.pallas.ragged_decode.triton_blocks import launch, load, power_of_two, store

_MIN_DOT = 16  # rows of a tensor core's operand


def ragged_decode(
    q: Float[Array, "B C G H"],
    k_pages: Float[Array, "pages page_size H"],
    v_pages: Float[Array, "pages page_size H"],
    page_table: Int[Array, "B C max_pages"],
    lengths: Int[Array, "B C"],
    *,
    tile: TritonTile,
    interpret: bool = False,
) -> Float[Array, "B C G H"]:
    """Softmax attention of one query token per row over that row's cached tokens.

    Raises:
        NotImplementedError: the kernels cannot take this type, group, head width or batch.
    """
    sizes = Sizes.of(q, k_pages, page_table, tile)
    outputs, peaks, masses = launch(
        partial(_attend, sizes=sizes),
        "ragged_decode",
        sizes.pieces,
        _partials(sizes),
        **_pipeline(tile),
        interpret=interpret,
    )(_rows(q), _rows(k_pages), _rows(v_pages), page_table.reshape(-1), lengths.reshape(-1))
    return merge_pieces(q, outputs, peaks, masses, lengths, sizes, interpret=interpret)


def append_and_decode(
    q: Float[Array, "B C G H"],
    k: Float[Array, "B C H"],
    v: Float[Array, "B C H"],
    pool: Pool,
    page_table: Int[Array, "B C max_pages"],
    lengths: Int[Array, "B C"],
    *,
    tile: TritonTile,
    interpret: bool = False,
) -> tuple[Float[Array, "B C G H"], Pool]:
    """Writes each owned row's new key and value to its page, and attends over them too.

    `lengths` counts the tokens before; rows of length 0 own nothing. The pool is updated in place:
    the program with a pair's last piece takes the new token from its registers and stores it, and
    no other program reads that place.

    Raises:
        NotImplementedError: the kernels cannot take this type, group, head width or batch.
    """
    sizes = Sizes.of(q, pool[0], page_table, tile)
    flat = tuple(_rows(pages) for pages in pool)
    written = tuple(jax.ShapeDtypeStruct(pages.shape, pages.dtype) for pages in flat)
    outputs, peaks, masses, k_rows, v_rows = launch(
        partial(_append_and_attend, sizes=sizes),
        "append_and_decode",
        sizes.pieces,
        (*_partials(sizes), *written),
        **_pipeline(tile),
        interpret=interpret,
        input_output_aliases={1: 3, 2: 4},
    )(_rows(q), *flat, page_table.reshape(-1), lengths.reshape(-1), _rows(k), _rows(v))
    pool = k_rows.reshape(pool[0].shape), v_rows.reshape(pool[1].shape)
    out = merge_pieces(q, outputs, peaks, masses, lengths, sizes, interpret=interpret)
    return out, pool


def _attend(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    table_ref: Any,
    lengths_ref: Any,
    o_ref: Any,
    peak_ref: Any,
    mass_ref: Any,
    *append: Any,
    sizes: Sizes,
) -> None:
    """One piece: an online softmax over its tiles, in base 2."""
    item = pl.program_id(0)
    piece = Pieces.of(lengths_ref, sizes).find(item)
    pair, length = piece.pair, piece.length

    @pl.when(piece.begin < piece.end)
    def run() -> None:
        q = _load_queries(q_ref, pair, sizes)
        state = jax.lax.fori_loop(
            piece.begin,
            piece.end,
            lambda i, state: _tile(i, state, q, pair, length, k_ref, v_ref, table_ref, sizes),
            _start(sizes),
        )
        if append:
            state = _append(state, piece.is_last, q, pair, length, table_ref, append, sizes)
        total, peak, mass = state
        group = jnp.arange(_MIN_DOT)
        rows = item * sizes.group + group
        store(o_ref, rows, total, group < sizes.group, sizes.width)
        plt.store(peak_ref.at[rows], peak, mask=group < sizes.group)
        plt.store(mass_ref.at[rows], mass, mask=group < sizes.group)


def _append_and_attend(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    table_ref: Any,
    lengths_ref: Any,
    k_new_ref: Any,
    v_new_ref: Any,
    o_ref: Any,
    peak_ref: Any,
    mass_ref: Any,
    k_out_ref: Any,
    v_out_ref: Any,
    *,
    sizes: Sizes,
) -> None:
    inputs = (q_ref, k_ref, v_ref, table_ref, lengths_ref)
    append = (k_new_ref, v_new_ref, k_out_ref, v_out_ref)
    _attend(*inputs, o_ref, peak_ref, mass_ref, *append, sizes=sizes)


def _tile(
    i: Array,
    state: tuple[Array, Array, Array],
    q: Array,
    pair: Array,
    length: Array,
    k_ref: Any,
    v_ref: Any,
    table_ref: Any,
    sizes: Sizes,
) -> tuple[Array, Array, Array]:
    """Adds the tokens of tile i; what lies behind the length is not read."""
    total, peak, mass = state
    token = i * sizes.tile.block_tokens + jnp.arange(sizes.tile.block_tokens)
    is_token = token < length
    row = _token_row(table_ref, pair, token, is_token, sizes)
    k = load(k_ref, row, is_token, sizes.width)
    v = load(v_ref, row, is_token, sizes.width)
    scores = _dot(q, k, trans_b=True) * _scale(sizes)
    scores = jnp.where(is_token[None, :], scores, NEVER)
    new_peak = jnp.maximum(peak, jnp.max(scores, axis=1))
    weights = jnp.exp2(scores - new_peak[:, None])
    decay = jnp.exp2(peak - new_peak)
    total = total * decay[:, None] + _dot(weights.astype(v.dtype), v)
    return total, new_peak, mass * decay + jnp.sum(weights, axis=1)


def _append(
    state: tuple[Array, Array, Array],
    is_last: Array,
    q: Array,
    pair: Array,
    length: Array,
    table_ref: Any,
    append: tuple[Any, ...],
    sizes: Sizes,
) -> tuple[Array, Array, Array]:
    """Adds the new token to a pair's last piece, and stores its key and value."""
    total, peak, mass = state
    k_new_ref, v_new_ref, k_out_ref, v_out_ref = append
    one = jnp.zeros(1, jnp.int32)
    mask = jnp.broadcast_to(is_last, (1,))
    k = load(k_new_ref, one + pair, mask, sizes.width)
    v = load(v_new_ref, one + pair, mask, sizes.width)
    row = _token_row(table_ref, pair, one + length, mask, sizes)
    store(k_out_ref, row, k, mask, sizes.width)
    store(v_out_ref, row, v, mask, sizes.width)
    score = jnp.sum(q.astype(jnp.float32) * k.astype(jnp.float32), axis=1) * _scale(sizes)
    score = jnp.where(is_last, score, NEVER)
    new_peak = jnp.maximum(peak, score)
    weight, decay = jnp.exp2(score - new_peak), jnp.exp2(peak - new_peak)
    total = total * decay[:, None] + weight[:, None] * v.astype(jnp.float32)
    return total, new_peak, mass * decay + weight


def _pipeline(tile: TritonTile) -> dict[str, int]:
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages}


def _partials(sizes: Sizes) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Of every piece and query head: the unnormalised output, the peak, the mass."""
    rows = sizes.pieces * sizes.group
    scalar = jax.ShapeDtypeStruct((rows,), jnp.float32)
    return jax.ShapeDtypeStruct((rows, sizes.width), jnp.float32), scalar, scalar


def _start(sizes: Sizes) -> tuple[Array, Array, Array]:
    width = power_of_two(sizes.width)
    return (
        jnp.zeros((_MIN_DOT, width), jnp.float32),
        jnp.full((_MIN_DOT,), NEVER, jnp.float32),
        jnp.zeros((_MIN_DOT,), jnp.float32),
    )


def _load_queries(q_ref: Any, pair: Array, sizes: Sizes) -> Array:
    """The group's queries, padded with zeros to what the tensor cores take."""
    group = jnp.arange(_MIN_DOT)
    return load(q_ref, pair * sizes.group + group, group < sizes.group, sizes.width)


def _token_row(table_ref: Any, pair: Array, token: Array, mask: Array, sizes: Sizes) -> Array:
    """The rows of the flat pool that hold a pair's tokens."""
    at = pair * sizes.max_pages + jax.lax.div(token, jnp.int32(sizes.page_size))
    page = plt.load(table_ref.at[at], mask=mask, other=0)
    return page * sizes.page_size + jax.lax.rem(token, jnp.int32(sizes.page_size))


def _dot(a: Array, b: Array, trans_b: bool = False) -> Array:
    """A product summed in float32; float32 operands are not rounded to tf32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return plt.dot(a, b, trans_b=trans_b, precision=precision)


def _scale(sizes: Sizes) -> float:
    return sizes.width**-0.5 * math.log2(math.e)


def _rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])
