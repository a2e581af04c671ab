"""Ragged decode attention for Hopper: a Pallas kernel lowered through Mosaic GPU.

Every piece (`pieces.py`) is one program. A small kernel lists the pieces first, because Mosaic has
no prefix sum to find them with. A program is one warpgroup. It keeps `num_stages` tiles of keys and
values in flight through shared memory; one TMA copy fetches the keys of a page and one its values,
and every stage has a barrier:

    page table  ->  TMA copies  ->  keys, values [stage, token, H]  ->  wgmma  ->  the next copies

wgmma multiplies 64 rows at a time, and a group has at most 16 query heads, so the products are
transposed: K q^T has a row per token, V^T p^T has a row per dimension of the head, and the group is
padded to 8 or 16 columns instead of 64 rows. Tensor cores would wait for the memory either way, but
the transposed softmax also has 4 to 8 times fewer entries.

The kernel of `merge.py` merges the pieces. This kernel has been compiled for sm_90a and interpreted
on CPU, but has not yet run on a GPU.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from fairkv_jax.pallas.ragged_decode.merge import NEVER, merge_pieces
from fairkv_jax.pallas.ragged_decode.mosaic_pipeline import (
    INTERPRETER,
    Buffers,
    Shapes,
    Work,
    tile_columns,
)
from fairkv_jax.pallas.ragged_decode.page_table import PageTable, of_layer
from fairkv_jax.pallas.ragged_decode.pieces import Sizes, layer_index, list_pieces
from fairkv_jax.pallas.ragged_decode.pool import Pool, Scales
from fairkv_jax.pallas.ragged_decode.reference import append
from fairkv_jax.pallas.ragged_decode.tiles import MosaicTile


def ragged_decode(
    q: Float[Array, "B 1 C G H"],
    k_pages: Float[Array, "pages page_size H"],
    v_pages: Float[Array, "pages page_size H"],
    page_table: PageTable,
    lengths: Int[Array, "*L B C"],
    layer: Int[Array, ""] | int | None = None,
    scales: Scales | None = None,
    *,
    tile: MosaicTile,
    interpret: bool = False,
) -> Float[Array, "B 1 C G H"]:
    """Softmax attention of one query token per row over the row's cached tokens.

    Raises:
        NotImplementedError: The kernel cannot take this number of queries, type, group, head
            dimension, page size or batch, or this JAX is too old for it.
    """
    shapes = Shapes.of(Sizes.of(q, k_pages, page_table, tile), q.dtype, k_pages.dtype)
    sizes, columns, layer = shapes.sizes, shapes.columns, layer_index(layer)
    pieces = list_pieces(lengths, page_table.starts, layer, sizes, interpret=interpret)
    queries = q.reshape(sizes.pairs, sizes.group, sizes.head_dim)
    queries = jnp.pad(queries, ((0, 0), (0, columns - sizes.group), (0, 0)))
    acc, m, l = plgpu.kernel(
        partial(_attend, shapes=shapes),
        out_type=shapes.outputs,
        scratch_types=shapes.buffers,
        grid=(sizes.pieces,),
        grid_names=("piece",),
        kernel_name="ragged_decode",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=INTERPRETER() if interpret else None,
    )(queries, k_pages, v_pages, *(scales or ()), page_table.pages, pieces)
    rows = acc.reshape(-1, sizes.head_dim), m.reshape(-1), l.reshape(-1)
    return merge_pieces(q, *rows, lengths, layer, sizes, interpret=interpret)


def append_and_decode(
    q: Float[Array, "B 1 C G H"],
    k: Float[Array, "B 1 C H"],
    v: Float[Array, "B 1 C H"],
    pool: Pool,
    page_table: PageTable,
    lengths: Int[Array, "*L B C"],
    layer: Int[Array, ""] | int | None = None,
    *,
    tile: MosaicTile,
    interpret: bool = False,
) -> tuple[Float[Array, "B 1 C G H"], Pool]:
    """Writes each owned row's new key and value to its page, and attends over them too.

    XLA writes them in place, before the kernel reads the pages. Errors as `ragged_decode`.
    """
    page_table, lengths = page_table.of_layer(layer), of_layer(lengths, layer)
    pool, lengths = append(k, v, pool, page_table, lengths)
    pages = pool.k_pages, pool.v_pages
    call = partial(ragged_decode, scales=pool.scales, tile=tile, interpret=interpret)
    return call(q, *pages, page_table, lengths), pool


def _attend(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    *refs: Any,
    shapes: Shapes,
    **buffers: Any,
) -> None:
    """Attends over one piece: an online softmax over its tiles, in base 2."""
    *scales, pages_ref, pieces_ref, acc_ref, m_ref, l_ref = refs
    k_scales_ref, v_scales_ref = scales or (None, None)
    item = jax.lax.axis_index("piece")
    pair, begin, end, length, start = (pieces_ref[item, field] for field in range(5))
    smem = Buffers(**buffers)
    pool = k_ref, v_ref, k_scales_ref, v_scales_ref
    work = Work(shapes, smem, *pool, pages_ref, start, begin, end, length)

    @pl.when(begin < end)
    def run() -> None:
        plgpu.copy_gmem_to_smem(q_ref.at[pair], smem.q, smem.q_landed)
        for ahead in range(shapes.sizes.tile.num_stages):
            tile = begin + ahead

            @pl.when(tile < end)
            def fetch(tile: Array = tile) -> None:
                work.fetch(tile, work.pages(tile))

        plgpu.barrier_wait(smem.q_landed)
        state = jax.lax.fori_loop(begin, end, partial(_tile, work=work), _start(shapes))
        acc, m, l = state
        smem.acc.transpose((1, 0))[...] = _transposed(acc)
        smem.m[...] = m
        smem.l[...] = l.sum(axis=0)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem.acc, acc_ref.at[item])
        plgpu.copy_smem_to_gmem(smem.m, m_ref.at[item])
        plgpu.copy_smem_to_gmem(smem.l, l_ref.at[item])
        plgpu.wait_smem_to_gmem(0)


def _tile(i: Array, state: tuple[Array, Array, Array], *, work: Work) -> Any:
    """Adds the tokens of tile i, and fetches the tile that takes its stage next.

    The state is acc [H, columns], m [columns] and l [tokens, columns], whose rows are summed at the
    end.
    """
    acc, m, l = state
    smem, sizes = work.buffers, work.shapes.sizes
    stage, next_tile = work.stage(i), i + sizes.tile.num_stages
    next_pages = work.pages(next_tile)  # early, because the loads are needed only at the end
    first = i * sizes.tile.block_tokens
    block = (sizes.tile.block_tokens, work.shapes.columns)

    plgpu.barrier_wait(smem.k_landed.at[stage])
    keys = smem.k.at[stage]
    if work.shapes.is_quantized:
        keys = _widened(keys, work)
    scores = _product(keys, smem.q.transpose((1, 0)))
    scores = scores * (sizes.head_dim**-0.5 * math.log2(math.e))
    if work.shapes.is_quantized:
        scores = scores * work.scales(work.k_scales_ref, i, block)
    scores = jnp.where(first + _row_of(block) < work.length, scores, NEVER)
    new_m = jnp.maximum(m, scores.max(axis=0))
    weights = jnp.exp2(scores - _as_row(new_m, block))
    decay = jnp.exp2(m - new_m)
    scaled = weights
    if work.shapes.is_quantized:
        scaled = weights * work.scales(work.v_scales_ref, i, block)
        scaled = jnp.where(first + _row_of(block) < work.length, scaled, 0.0)
    smem.weights.transpose((1, 0))[...] = _transposed(scaled.astype(work.shapes.dtype))

    plgpu.barrier_wait(smem.v_landed.at[stage])
    tile_values = smem.v.at[stage]
    if work.shapes.is_quantized:
        tile_values = _widened(tile_values, work)
    else:
        _clear_tail(tile_values, first, work)
    plgpu.commit_smem()
    values = _product(tile_values.transpose((1, 0)), smem.weights.transpose((1, 0)))

    @pl.when(next_tile < work.end)
    def fetch() -> None:
        work.fetch(next_tile, next_pages)

    acc = acc * _as_row(decay, acc.shape) + values
    return acc, new_m, l * _as_row(decay, block) + weights


def _clear_tail(values_ref: Any, first: Array, work: Work) -> None:
    """Sets the values past the length to 0: their weights are 0, but they may be NaN."""
    sizes = work.shapes.sizes

    @pl.when(first + sizes.tile.block_tokens > work.length)
    def clear_tail() -> None:
        for part in _parts(values_ref, work):
            values = plgpu.layout_cast(part[...], plgpu.Layout.WGMMA)
            is_token = first + _row_of(values.shape) < work.length
            part[...] = jnp.where(is_token, values, jnp.zeros_like(values))


def _widened(tile_ref: Any, work: Work) -> Any:
    """The buffer that holds an int8 tile in the type of the queries, until the next one."""
    wide = work.buffers.wide
    plgpu.commit_smem()  # a barrier: every warp has multiplied with what is there
    for part, target in zip(_parts(tile_ref, work), _parts(wide, work), strict=True):
        values = plgpu.layout_cast(part[...], plgpu.Layout.WGMMA_UPCAST_2X)
        target[...] = plgpu.layout_cast(values.astype(work.shapes.dtype), plgpu.Layout.WGMMA)
    plgpu.commit_smem()
    return wide


def _parts(tile_ref: Any, work: Work) -> list[Any]:
    """A tile of the cache in parts, which take few registers each."""
    head_dim = work.shapes.sizes.head_dim
    width = tile_columns(head_dim, work.shapes.page_dtype)
    return [tile_ref.at[:, pl.ds(column, width)] for column in range(0, head_dim, width)]


def _start(shapes: Shapes) -> tuple[Array, Array, Array]:
    wgmma, columns = plgpu.Layout.WGMMA, shapes.columns
    m = jnp.full((columns,), NEVER, jnp.float32)
    return (
        plgpu.layout_cast(jnp.zeros((shapes.sizes.head_dim, columns)), wgmma),
        plgpu.layout_cast(m, wgmma.reduce(0)),
        plgpu.layout_cast(jnp.zeros((shapes.sizes.tile.block_tokens, columns)), wgmma),
    )


def _product(a_ref: Any, b_ref: Any) -> Array:
    """a b in float32; once this returns, the buffers of a and b may be overwritten."""

    def multiply(sum_ref: Any) -> Array:
        plgpu.wgmma(sum_ref, a_ref, b_ref)
        return sum_ref[...]

    shape = a_ref.shape[0], b_ref.shape[1]
    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))


def _row_of(shape: tuple[int, ...]) -> Array:
    return plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)


def _as_row(x: Array, shape: tuple[int, ...]) -> Array:
    return jax.lax.broadcast_in_dim(x, shape, [1])


def _transposed(x: Array) -> Array:
    """`x` in the register layout that a store into a transposed buffer takes."""
    return plgpu.layout_cast(x, plgpu.Layout.WGMMA_TRANSPOSED)
