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
from jaxtyping import Array, Float, Int, Num

from fairkv_jax.pallas.ragged_decode.merge import NEVER, merge_pieces
from fairkv_jax.pallas.ragged_decode.page_table import PageTable
from fairkv_jax.pallas.ragged_decode.pieces import Pieces, Sizes, layer_index
from fairkv_jax.pallas.ragged_decode.pool import Pool, Scales, dequantize, tokens_of
from fairkv_jax.pallas.ragged_decode.tiles import TritonTile
from fairkv_jax.pallas.ragged_decode.triton_blocks import launch, load, store
from fairkv_jax.shapes import next_power_of_two

_MIN_DOT = 16  # rows of a tensor core's operand

Token = tuple[Array, Array | None]
"""The keys or values of some tokens, and their scales where they are int8."""
State = tuple[Array, Array, Array]
"""The running softmax: acc [16, H], m [16] and l [16], with a row per query head, padded."""


def ragged_decode(
    q: Float[Array, "B 1 C G H"],
    k_pages: Num[Array, "pages page_size H"],
    v_pages: Num[Array, "pages page_size H"],
    page_table: PageTable,
    lengths: Int[Array, "*L B C"],
    layer: Int[Array, ""] | int | None = None,
    scales: Scales | None = None,
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
        **_pipeline(sizes, tile),
        interpret=interpret,
    )(_rows(q), _flat(Pool(k_pages, v_pages, scales)), *_lists(page_table, lengths), layer)
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
    sizes, layer = Sizes.of(q, pool.k_pages, page_table, tile), layer_index(layer)
    flat = _flat(pool)
    written = jax.tree.map(lambda rows: jax.ShapeDtypeStruct(rows.shape, rows.dtype), flat)
    # In the order in which the arguments and the results are listed.
    aliases = {1 + i: 3 + i for i in range(len(jax.tree.leaves(flat)))}
    acc, m, l, rows = launch(
        partial(_append_and_attend, sizes=sizes),
        "append_and_decode",
        sizes.pieces,
        (*_partials(sizes), written),
        **_pipeline(sizes, tile),
        interpret=interpret,
        input_output_aliases=aliases,
    )(_rows(q), flat, *_lists(page_table, lengths), layer, _new_tokens(k, v, pool))
    pool = jax.tree.map(lambda rows, pages: rows.reshape(pages.shape), rows, pool)
    out = merge_pieces(q, acc, m, l, lengths, layer, sizes, interpret=interpret)
    return out, pool


@dataclass(frozen=True)
class _Work:
    """The pair of a program's piece: its queries, and where its tokens lie."""

    sizes: Sizes
    pool: Pool
    """References to the rows of the pool."""
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
    pool: Pool,
    pages_ref: Any,
    starts_ref: Any,
    lengths_ref: Any,
    layer_ref: Any,
    acc_ref: Any,
    m_ref: Any,
    l_ref: Any,
    *append: Pool,
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
        work = _Work(sizes, pool, pages_ref, piece.pair, start, piece.length, q)
        state = jax.lax.fori_loop(piece.begin, piece.end, partial(_tile, work=work), _start(sizes))
        if append:
            state = _append(state, piece.is_last, work, *append)
        acc, m, l = state
        group = jnp.arange(_MIN_DOT)
        rows = item * sizes.group + group
        store(acc_ref, rows, acc, group < sizes.group, sizes.head_dim)
        plt.store(m_ref.at[rows], m, mask=group < sizes.group)
        plt.store(l_ref.at[rows], l, mask=group < sizes.group)


def _append_and_attend(*refs: Any, sizes: Sizes) -> None:
    """As `_attend`, with the new keys and values as inputs and the pool as outputs."""
    *inputs, new, acc_ref, m_ref, l_ref, written = refs
    _attend(*inputs, acc_ref, m_ref, l_ref, new, written, sizes=sizes)


def _tile(i: Array, state: State, *, work: _Work) -> State:
    """Adds the tokens of tile i; tokens past the length are not read."""
    acc, m, l = state
    sizes = work.sizes
    token = i * sizes.tile.block_tokens + jnp.arange(sizes.tile.block_tokens)
    is_token = token < work.length
    row = work.pool_rows(token, is_token)
    (k, k_scales), (v, v_scales) = _load_tokens(work.pool, row, is_token, sizes)
    scores = _dot(work.q, k.astype(work.q.dtype), trans_b=True) * _scale(sizes)
    if k_scales is not None:
        scores *= k_scales[None, :]
    scores = jnp.where(is_token[None, :], scores, NEVER)
    new_m = jnp.maximum(m, jnp.max(scores, axis=1))
    weights = jnp.exp2(scores - new_m[:, None])
    decay = jnp.exp2(m - new_m)
    # int8 is exact in each of the queries' types: tensor cores multiply it without its scale.
    scaled = weights if v_scales is None else weights * v_scales[None, :]
    products = _dot(scaled.astype(work.q.dtype), v.astype(work.q.dtype))
    acc = acc * decay[:, None] + products
    return acc, new_m, l * decay + jnp.sum(weights, axis=1)


def _append(state: State, is_last: Array, work: _Work, new: Pool, written: Pool) -> State:
    """Adds the new token to a pair's last piece, and stores its key and value."""
    acc, m, l = state
    sizes = work.sizes
    one = jnp.zeros(1, jnp.int32)
    mask = jnp.broadcast_to(is_last, (1,))
    tokens = _load_tokens(new, one + work.pair, mask, sizes)
    token = one + work.length
    is_stored = mask & work.has_page(token)
    row = work.pool_rows(token, is_stored)
    _store_tokens(written, row, tokens, is_stored, sizes)
    k, v = (
        x.astype(jnp.float32) if scales is None else dequantize(x, scales[:, None])
        for x, scales in tokens
    )
    score = jnp.sum(work.q.astype(jnp.float32) * k, axis=1) * _scale(sizes)
    score = jnp.where(is_last, score, NEVER)
    new_m = jnp.maximum(m, score)
    weight, decay = jnp.exp2(score - new_m), jnp.exp2(m - new_m)
    acc = acc * decay[:, None] + weight[:, None] * v
    return acc, new_m, l * decay + weight


def _load_tokens(pool: Pool, row: Array, mask: Array, sizes: Sizes) -> tuple[Token, Token]:
    """The keys and values in these rows of the pool, with their scales in float32 if any."""
    k, v = (load(ref, row, mask, sizes.head_dim) for ref in (pool.k_pages, pool.v_pages))
    refs: Any = pool.scales
    if refs is None:
        return (k, None), (v, None)
    k_scales, v_scales = (
        plt.load(ref.at[row], mask=mask, other=0).astype(jnp.float32) for ref in refs
    )
    return (k, k_scales), (v, v_scales)


def _store_tokens(
    pool: Pool, row: Array, tokens: tuple[Token, Token], mask: Array, sizes: Sizes
) -> None:
    """Writes to the pool what `_load_tokens` returned."""
    for ref, (x, _) in zip((pool.k_pages, pool.v_pages), tokens, strict=True):
        store(ref, row, x, mask, sizes.head_dim)
    refs: Any = pool.scales
    if refs is not None:
        for ref, (_, scales) in zip(refs, tokens, strict=True):
            plt.store(ref.at[row], jnp.asarray(scales).astype(ref.dtype), mask=mask)


def _pipeline(sizes: Sizes, tile: TritonTile) -> dict[str, int]:
    return {"num_warps": sizes.num_warps(tile.num_warps), "num_stages": tile.num_stages}


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


def _flat(pool: Pool) -> Pool:
    """The pool with a row per token in place of pages."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), pool)


def _new_tokens(k: Float[Array, "B 1 C H"], v: Float[Array, "B 1 C H"], pool: Pool) -> Pool:
    """The new tokens in the pool's type, with a row per pair."""
    return tokens_of(_rows(k), _rows(v), pool)
