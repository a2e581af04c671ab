"""Ragged decode attention for Hopper: a Pallas kernel lowered through Mosaic GPU.

One program a piece (`pieces.py`), listed by a small kernel in front, because Mosaic has no prefix
sum to find them with. A program is one warpgroup. It keeps `num_stages` tiles of keys and values in
flight through shared memory, each page fetched by one TMA copy of its keys and one of its values,
with a barrier a stage:

    page table  ->  TMA copies  ->  keys, values [stage, token, H]  ->  wgmma  ->  the next copies

wgmma multiplies 64 rows at a time, and a group has at most 16 query heads, so the products are
turned round: tokens are the rows of K q^T, the head width is the rows of V^T p^T, and the group,
padded to 8 or 16 columns, is what would otherwise have been padded to 64 rows. Tensor cores would
wait for the memory either way; turned round, the softmax has 4 to 8 times fewer entries too.

Pieces are merged by the Triton path's kernel (`merge.py`). Compiled for sm_90a and interpreted on
CPU; not yet run on a GPU.
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
    TILE_COLUMNS,
    Buffers,
    Shapes,
    Work,
)
from fairkv_jax.pallas.ragged_decode.pieces import Sizes, list_pieces
from fairkv_jax.pallas.ragged_decode.reference import Pool, append
from fairkv_jax.pallas.ragged_decode.tiles import MosaicTile


def ragged_decode(
    q: Float[Array, "B C G H"],
    k_pages: Float[Array, "pages page_size H"],
    v_pages: Float[Array, "pages page_size H"],
    page_table: Int[Array, "B C max_pages"],
    lengths: Int[Array, "B C"],
    *,
    tile: MosaicTile,
    interpret: bool = False,
) -> Float[Array, "B C G H"]:
    """Softmax attention of one query token per row over that row's cached tokens.

    Raises:
        NotImplementedError: the kernel cannot take this type, group, head width, page size or
            batch, or this JAX is too old for it.
    """
    shapes = Shapes.of(Sizes.of(q, k_pages, page_table, tile), q.dtype)
    sizes, columns = shapes.sizes, shapes.columns
    pieces = list_pieces(lengths, sizes, interpret=interpret)
    queries = q.reshape(sizes.pairs, sizes.group, sizes.width)
    queries = jnp.pad(queries, ((0, 0), (0, columns - sizes.group), (0, 0)))
    table = page_table.reshape(sizes.pairs, sizes.max_pages)
    outputs, peaks, masses = plgpu.kernel(
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
    )(queries, k_pages, v_pages, table, pieces)
    rows = outputs.reshape(-1, sizes.width), peaks.reshape(-1), masses.reshape(-1)
    return merge_pieces(q, *rows, lengths, sizes, interpret=interpret)


def append_and_decode(
    q: Float[Array, "B C G H"],
    k: Float[Array, "B C H"],
    v: Float[Array, "B C H"],
    pool: Pool,
    page_table: Int[Array, "B C max_pages"],
    lengths: Int[Array, "B C"],
    *,
    tile: MosaicTile,
    interpret: bool = False,
) -> tuple[Float[Array, "B C G H"], Pool]:
    """Writes each owned row's new key and value to its page, and attends over them too.

    XLA writes them in place, before the kernel reads the pages. Errors as `ragged_decode`.
    """
    pool, lengths = append(k, v, pool, page_table, lengths)
    return ragged_decode(q, *pool, page_table, lengths, tile=tile, interpret=interpret), pool


def _attend(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    table_ref: Any,
    pieces_ref: Any,
    o_ref: Any,
    peak_ref: Any,
    mass_ref: Any,
    *,
    shapes: Shapes,
    **buffers: Any,
) -> None:
    """One piece: an online softmax over its tiles, in base 2."""
    item = jax.lax.axis_index("piece")
    pair, begin, end, length = (pieces_ref[item, field] for field in range(4))
    smem = Buffers(**buffers)
    work = Work(shapes, smem, k_ref, v_ref, table_ref, pair, begin, end, length)

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
        total, peak, mass = state
        smem.output.transpose((1, 0))[...] = _turned(total)
        smem.peak[...] = peak
        smem.mass[...] = mass.sum(axis=0)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem.output, o_ref.at[item])
        plgpu.copy_smem_to_gmem(smem.peak, peak_ref.at[item])
        plgpu.copy_smem_to_gmem(smem.mass, mass_ref.at[item])
        plgpu.wait_smem_to_gmem(0)


def _tile(i: Array, state: tuple[Array, Array, Array], *, work: Work) -> Any:
    """Adds the tokens of tile i, and fetches the tile that takes its stage next.

    The state: output [H, columns], peak [columns], and mass [tokens, columns], whose rows are
    summed in the end.
    """
    total, peak, mass = state
    smem, sizes = work.buffers, work.shapes.sizes
    stage, next_tile = work.stage(i), i + sizes.tile.num_stages
    next_pages = work.pages(next_tile)  # early: their loads are waited for at the end
    first = i * sizes.tile.block_tokens
    block = (sizes.tile.block_tokens, work.shapes.columns)

    plgpu.barrier_wait(smem.k_landed.at[stage])
    scores = _product(smem.k.at[stage], smem.q.transpose((1, 0)))
    scores = scores * (sizes.width**-0.5 * math.log2(math.e))
    scores = jnp.where(first + _row_of(block) < work.length, scores, NEVER)
    new_peak = jnp.maximum(peak, scores.max(axis=0))
    weights = jnp.exp2(scores - _as_row(new_peak, block))
    decay = jnp.exp2(peak - new_peak)
    smem.weights.transpose((1, 0))[...] = _turned(weights.astype(work.shapes.dtype))

    plgpu.barrier_wait(smem.v_landed.at[stage])

    @pl.when(first + sizes.tile.block_tokens > work.length)
    def clear_tail() -> None:
        # Weights there are 0, but what lies in a page behind the length may be no number.
        for column in range(0, sizes.width, TILE_COLUMNS):  # by parts, to take few registers
            part = smem.v.at[stage, :, pl.ds(column, TILE_COLUMNS)]
            values = plgpu.layout_cast(part[...], plgpu.Layout.WGMMA)
            is_token = first + _row_of(values.shape) < work.length
            part[...] = jnp.where(is_token, values, jnp.zeros_like(values))

    plgpu.commit_smem()
    values = _product(smem.v.at[stage].transpose((1, 0)), smem.weights.transpose((1, 0)))

    @pl.when(next_tile < work.end)
    def fetch() -> None:
        work.fetch(next_tile, next_pages)

    total = total * _as_row(decay, total.shape) + values
    return total, new_peak, mass * _as_row(decay, block) + weights


def _start(shapes: Shapes) -> tuple[Array, Array, Array]:
    wgmma, columns = plgpu.Layout.WGMMA, shapes.columns
    peak = jnp.full((columns,), NEVER, jnp.float32)
    return (
        plgpu.layout_cast(jnp.zeros((shapes.sizes.width, columns)), wgmma),
        plgpu.layout_cast(peak, wgmma.reduce(0)),
        plgpu.layout_cast(jnp.zeros((shapes.sizes.tile.block_tokens, columns)), wgmma),
    )


def _product(a_ref: Any, b_ref: Any) -> Array:
    """a b in float32; it has been computed, and the buffers may be written, when this returns."""

    def multiply(sum_ref: Any) -> Array:
        plgpu.wgmma(sum_ref, a_ref, b_ref)
        return sum_ref[...]

    shape = a_ref.shape[0], b_ref.shape[1]
    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))


def _row_of(shape: tuple[int, ...]) -> Array:
    return plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)


def _as_row(x: Array, shape: tuple[int, ...]) -> Array:
    return jax.lax.broadcast_in_dim(x, shape, [1])


def _turned(x: Array) -> Array:
    """In the registers that a store into a transposed buffer takes."""
    return plgpu.layout_cast(x, plgpu.Layout.WGMMA_TRANSPOSED)
