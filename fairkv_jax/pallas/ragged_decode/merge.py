"""Merges the pieces of every (row, slot) pair by the log-sum-exp rule: a backend's last kernel.

With unnormalised outputs acc_i, maxima m_i and sums of weights l_i, in base 2:

    m = max_i m_i      o = sum_i 2^(m_i - m) acc_i / sum_i 2^(m_i - m) l_i
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from fairkv_jax.pallas.ragged_decode.pieces import Pieces, Sizes
from fairkv_jax.pallas.ragged_decode.triton_blocks import (
    ceil_div,
    launch,
    load,
    store,
)
from fairkv_jax.shapes import next_power_of_two

NEVER = -1e30  # a finite minus infinity: the difference of two of them is 0, not NaN
_ELEMENTS = 4096


def merge_pieces(
    q: Float[Array, "B 1 C G H"],
    acc: Float[Array, "rows H"],
    m: Float[Array, "rows"],
    l: Float[Array, "rows"],
    lengths: Int[Array, "*L B C"],
    layer: Int[Array, "1"],
    sizes: Sizes,
    *,
    interpret: bool = False,
) -> Float[Array, "B 1 C G H"]:
    """The attention of every pair, in the queries' type; zeros for a pair without tokens.

    All pieces have the same number of rows, the first G of which hold their query heads.
    """
    (out,) = launch(
        partial(_merge, sizes=sizes, rows_per_piece=len(m) // sizes.pieces),
        "merge_pieces",
        sizes.pairs,
        (jax.ShapeDtypeStruct((sizes.pairs * sizes.group, sizes.head_dim), q.dtype),),
        interpret=interpret,
    )(lengths.reshape(-1), layer, acc, m, l)
    return out.reshape(q.shape)


def _merge(
    lengths_ref: Any,
    layer_ref: Any,
    acc_ref: Any,
    m_ref: Any,
    l_ref: Any,
    out_ref: Any,
    *,
    sizes: Sizes,
    rows_per_piece: int,
) -> None:
    """Merges the pieces of one pair, a block of them at a time so that their loads overlap."""
    pair = pl.program_id(0)
    first, count = Pieces.of(lengths_ref, layer_ref, sizes).span(pair)
    group, head_dim = next_power_of_two(sizes.group), next_power_of_two(sizes.head_dim)
    block = max(1, _ELEMENTS // (group * head_dim))
    is_group = jnp.arange(group) < sizes.group

    def step(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        acc, m, l = state
        piece = i * block + jnp.arange(block)
        row = (first + piece)[:, None] * rows_per_piece + jnp.arange(group)[None, :]
        mask = (piece < count)[:, None] & is_group[None, :]
        block_m = plt.load(m_ref.at[row], mask=mask, other=NEVER)
        block_l = plt.load(l_ref.at[row], mask=mask, other=0.0)
        block_acc = load(acc_ref, row, mask, sizes.head_dim)
        new_m = jnp.maximum(m, jnp.max(block_m, axis=0))
        weights, decay = jnp.exp2(block_m - new_m[None, :]), jnp.exp2(m - new_m)
        acc = acc * decay[:, None] + jnp.sum(block_acc * weights[:, :, None], axis=0)
        return acc, new_m, l * decay + jnp.sum(block_l * weights, axis=0)

    start = (jnp.zeros((group, head_dim)), jnp.full((group,), NEVER), jnp.zeros((group,)))
    acc, _, l = jax.lax.fori_loop(0, ceil_div(count, block), step, start)
    out = acc / jnp.where(l == 0, 1.0, l)[:, None]
    rows = pair * sizes.group + jnp.arange(group)
    store(out_ref, rows, out.astype(out_ref.dtype), is_group, sizes.head_dim)
