"""Ragged decode attention for GPUs: Pallas kernels lowered through Triton.

The cached tokens of all (row, slot) pairs are cut into pieces of nearly equal size, so that pairs
of very different length keep every multiprocessor busy. With 2 tiles a piece:

    lengths, in tiles   pair 0: 5       pair 1: 0   pair 2: 3
    pieces              [0,0..1] [0,1..3] [0,3..5]  [2,0..1] [2,1..3]       one program each

No list is stored: every program reads the lengths and finds its own piece among them, which is
cheaper than another kernel in front. A piece leaves its unnormalised output, peak and mass; a
second kernel merges the pieces of a pair.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from fairkv_jax.pallas.ragged_decode.reference import Pool
from fairkv_jax.pallas.ragged_decode.tiles import TritonTile
from fairkv_jax.pallas.ragged_decode.triton_blocks import (
    Pieces,
    Sizes,
    ceil_div,
    load,
    power_of_two,
    store,
    token_row,
)

_MIN_DOT = 16  # rows of a tensor core's operand
_MERGE_ELEMENTS = 4096
_NEVER = -1e30  # a finite minus infinity: the difference of two of them is 0, not NaN


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
    partials = _partials(sizes)
    pieces = _call(
        partial(_attend, sizes=sizes),
        "ragged_decode",
        sizes.pieces,
        partials,
        tile,
        interpret=interpret,
    )(_rows(q), _rows(k_pages), _rows(v_pages), page_table.reshape(-1), lengths.reshape(-1))
    return _merged(q, pieces, lengths, sizes, interpret)


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
    *pieces, k_rows, v_rows = _call(
        partial(_append_and_attend, sizes=sizes),
        "append_and_decode",
        sizes.pieces,
        (*_partials(sizes), *written),
        tile,
        interpret=interpret,
        input_output_aliases={1: 3, 2: 4},
    )(_rows(q), *flat, page_table.reshape(-1), lengths.reshape(-1), _rows(k), _rows(v))
    pool = k_rows.reshape(pool[0].shape), v_rows.reshape(pool[1].shape)
    return _merged(q, pieces, lengths, sizes, interpret), pool


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
    pieces = Pieces.of(lengths_ref, sizes)
    pair = jnp.sum((pieces.ends <= item).astype(jnp.int32))

    @pl.when(item < jnp.sum(pieces.counts))
    def run() -> None:
        tiles, count = pieces.pick(pieces.tiles, pair), pieces.pick(pieces.counts, pair)
        length = pieces.pick(pieces.lengths, pair)
        piece = item - (pieces.pick(pieces.ends, pair) - count)
        begin = jax.lax.div(piece * tiles, count)
        end = jax.lax.div((piece + 1) * tiles, count)
        q = _load_queries(q_ref, pair, sizes)
        state = jax.lax.fori_loop(
            begin,
            end,
            lambda i, state: _tile(i, state, q, pair, length, k_ref, v_ref, table_ref, sizes),
            _start(sizes),
        )
        if append:
            is_last = piece == count - 1
            state = _append(state, is_last, q, pair, length, table_ref, append, sizes)
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
    row = token_row(table_ref, pair, token, is_token, sizes)
    k = load(k_ref, row, is_token, sizes.width)
    v = load(v_ref, row, is_token, sizes.width)
    scores = _dot(q, k, trans_b=True) * _scale(sizes)
    scores = jnp.where(is_token[None, :], scores, _NEVER)
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
    row = token_row(table_ref, pair, one + length, mask, sizes)
    store(k_out_ref, row, k, mask, sizes.width)
    store(v_out_ref, row, v, mask, sizes.width)
    score = jnp.sum(q.astype(jnp.float32) * k.astype(jnp.float32), axis=1) * _scale(sizes)
    score = jnp.where(is_last, score, _NEVER)
    new_peak = jnp.maximum(peak, score)
    weight, decay = jnp.exp2(score - new_peak), jnp.exp2(peak - new_peak)
    total = total * decay[:, None] + weight[:, None] * v.astype(jnp.float32)
    return total, new_peak, mass * decay + weight


def _merge(
    lengths_ref: Any, o_ref: Any, peak_ref: Any, mass_ref: Any, out_ref: Any, *, sizes: Sizes
) -> None:
    """The pieces of one pair, a block of them at a time so that their loads overlap."""
    pair = pl.program_id(0)
    pieces = Pieces.of(lengths_ref, sizes)
    count = pieces.pick(pieces.counts, pair)
    first = pieces.pick(pieces.ends, pair) - count
    group, width = power_of_two(sizes.group), power_of_two(sizes.width)
    block = max(1, _MERGE_ELEMENTS // (group * width))
    is_group = jnp.arange(group) < sizes.group

    def step(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        total, peak, mass = state
        piece = i * block + jnp.arange(block)
        row = (first + piece)[:, None] * sizes.group + jnp.arange(group)[None, :]
        mask = (piece < count)[:, None] & is_group[None, :]
        peaks = plt.load(peak_ref.at[row], mask=mask, other=_NEVER)
        masses = plt.load(mass_ref.at[row], mask=mask, other=0.0)
        totals = load(o_ref, row, mask, sizes.width)
        new_peak = jnp.maximum(peak, jnp.max(peaks, axis=0))
        weights, decay = jnp.exp2(peaks - new_peak[None, :]), jnp.exp2(peak - new_peak)
        total = total * decay[:, None] + jnp.sum(totals * weights[:, :, None], axis=0)
        return total, new_peak, mass * decay + jnp.sum(masses * weights, axis=0)

    start = (jnp.zeros((group, width)), jnp.full((group,), _NEVER), jnp.zeros((group,)))
    total, _, mass = jax.lax.fori_loop(0, ceil_div(count, block), step, start)
    out = total / jnp.where(mass == 0, 1.0, mass)[:, None]
    rows = pair * sizes.group + jnp.arange(group)
    store(out_ref, rows, out.astype(out_ref.dtype), is_group, sizes.width)


def _merged(q: Array, pieces: Any, lengths: Array, sizes: Sizes, interpret: bool) -> Array:
    (out,) = _call(
        partial(_merge, sizes=sizes),
        "merge_pieces",
        sizes.pairs,
        (jax.ShapeDtypeStruct((sizes.pairs * sizes.group, sizes.width), q.dtype),),
        None,
        interpret=interpret,
    )(lengths.reshape(-1), *pieces)
    return out.reshape(q.shape)


def _call(
    kernel: Any,
    name: str,
    programs: int,
    outputs: tuple[jax.ShapeDtypeStruct, ...],
    tile: TritonTile | None,
    **options: Any,
) -> Any:
    """A kernel over whole arrays, which it indexes itself."""
    params = plt.CompilerParams(num_warps=4, num_stages=1)
    if tile is not None:
        params = plt.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages)
    return pl.pallas_call(
        kernel,
        out_shape=outputs,
        grid=(programs,),
        compiler_params=params,
        name=name,
        **options,
    )


def _partials(sizes: Sizes) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Of every piece and query head: the unnormalised output, the peak, the mass."""
    rows = sizes.pieces * sizes.group
    scalar = jax.ShapeDtypeStruct((rows,), jnp.float32)
    return jax.ShapeDtypeStruct((rows, sizes.width), jnp.float32), scalar, scalar


def _start(sizes: Sizes) -> tuple[Array, Array, Array]:
    width = power_of_two(sizes.width)
    return (
        jnp.zeros((_MIN_DOT, width), jnp.float32),
        jnp.full((_MIN_DOT,), _NEVER, jnp.float32),
        jnp.zeros((_MIN_DOT,), jnp.float32),
    )


def _load_queries(q_ref: Any, pair: Array, sizes: Sizes) -> Array:
    """The group's queries, padded with zeros to what the tensor cores take."""
    group = jnp.arange(_MIN_DOT)
    return load(q_ref, pair * sizes.group + group, group < sizes.group, sizes.width)


def _dot(a: Array, b: Array, trans_b: bool = False) -> Array:
    """A product summed in float32; float32 operands are not rounded to tf32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return plt.dot(a, b, trans_b=trans_b, precision=precision)


def _scale(sizes: Sizes) -> float:
    return sizes.width**-0.5 * math.log2(math.e)


def _rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])
