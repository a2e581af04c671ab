"""The pieces of every (row, slot) merged by the log-sum-exp rule: the last kernel of a GPU backend.

With unnormalised outputs o_i, peaks m_i and masses l_i, in base 2:

    m = max_i m_i      o = sum_i 2^(m_i - m) o_i / sum_i 2^(m_i - m) l_i
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
    power_of_two,
    store,
)

NEVER = -1e30  # a finite minus infinity: the difference of two of them is 0, not NaN
_ELEMENTS = 4096


def merge_pieces(
    q: Float[Array, "B C G H"],
    outputs: Float[Array, "rows H"],
    peaks: Float[Array, "rows"],
    masses: Float[Array, "rows"],
    lengths: Int[Array, "B C"],
    sizes: Sizes,
    *,
    interpret: bool = False,
) -> Float[Array, "B C G H"]:
    """The attention of every pair, in the queries' type; zeros for a pair without tokens.

    Every piece has as many rows, of which the first G hold its query heads.
    """
    (out,) = launch(
        partial(_merge, sizes=sizes, rows_a_piece=len(peaks) // sizes.pieces),
        "merge_pieces",
        sizes.pairs,
        (jax.ShapeDtypeStruct((sizes.pairs * sizes.group, sizes.width), q.dtype),),
        interpret=interpret,
    )(lengths.reshape(-1), outputs, peaks, masses)
    return out.reshape(q.shape)


def _merge(
    lengths_ref: Any,
    o_ref: Any,
    peak_ref: Any,
    mass_ref: Any,
    out_ref: Any,
    *,
    sizes: Sizes,
    rows_a_piece: int,
) -> None:
    """The pieces of one pair, a block of them at a time so that their loads overlap."""
    pair = pl.program_id(0)
    first, count = Pieces.of(lengths_ref, sizes).span(pair)
    group, width = power_of_two(sizes.group), power_of_two(sizes.width)
    block = max(1, _ELEMENTS // (group * width))
    is_group = jnp.arange(group) < sizes.group

    def step(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        total, peak, mass = state
        piece = i * block + jnp.arange(block)
        row = (first + piece)[:, None] * rows_a_piece + jnp.arange(group)[None, :]
        mask = (piece < count)[:, None] & is_group[None, :]
        peaks = plt.load(peak_ref.at[row], mask=mask, other=NEVER)
        masses = plt.load(mass_ref.at[row], mask=mask, other=0.0)
        totals = load(o_ref, row, mask, sizes.width)
        new_peak = jnp.maximum(peak, jnp.max(peaks, axis=0))
        weights, decay = jnp.exp2(peaks - new_peak[None, :]), jnp.exp2(peak - new_peak)
        total = total * decay[:, None] + jnp.sum(totals * weights[:, :, None], axis=0)
        return total, new_peak, mass * decay + jnp.sum(masses * weights, axis=0)

    start = (jnp.zeros((group, width)), jnp.full((group,), NEVER), jnp.zeros((group,)))
    total, _, mass = jax.lax.fori_loop(0, ceil_div(count, block), step, start)
    out = total / jnp.where(mass == 0, 1.0, mass)[:, None]
    rows = pair * sizes.group + jnp.arange(group)
    store(out_ref, rows, out.astype(out_ref.dtype), is_group, sizes.width)
