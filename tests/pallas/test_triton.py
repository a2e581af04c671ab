"""The Triton-style kernels, interpreted on CPU, against float64 NumPy."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fairkv_jax.pallas.ragged_decode import triton
from fairkv_jax.pallas.ragged_decode.tiles import TritonTile
from tests.pallas.oracle import Case, append, attend, relative_error

TOLERANCE = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 1e-2}
SHAPES: list[dict[str, Any]] = [
    {"group": 1, "width": 64, "batch": 1, "slots": 1},
    {"group": 3, "width": 64, "page_size": 8, "max_pages": 20},
    {"group": 4, "width": 128, "page_size": 64, "max_pages": 3},
    {"group": 8, "width": 96, "dtype": "bfloat16"},
    {"group": 16, "width": 256, "dtype": "bfloat16"},
    {"group": 2, "width": 256, "dtype": "float16", "batch": 7},
]
# Blocks below, at and above a page; more pieces and fewer than there are pairs.
TILES = [
    TritonTile(block_tokens=16, num_warps=4, num_stages=2, programs=3, min_blocks=1),
    TritonTile(block_tokens=32, num_warps=4, num_stages=2, programs=40, min_blocks=1),
    TritonTile(block_tokens=64, num_warps=4, num_stages=2, programs=1000, min_blocks=2),
]


def run_decode(case: Case, tile: TritonTile) -> jax.Array:
    call = partial(triton.ragged_decode, tile=tile, interpret=True)
    return jax.jit(call)(*case.arrays)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_agrees_with_float64(shape: dict[str, Any]) -> None:
    case = Case.random(1, **shape)
    out = run_decode(case, TILES[1])
    assert out.dtype == case.q.dtype
    assert relative_error(out, attend(case)) < TOLERANCE[case.q.dtype.name]


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile.block_tokens}x{tile.programs}")
def test_every_cut_into_pieces_gives_the_same(tile: TritonTile) -> None:
    case = Case.random(2, batch=5, slots=2, max_pages=11)
    assert relative_error(run_decode(case, tile), attend(case)) < TOLERANCE["float32"]


def test_rows_without_tokens_are_zero() -> None:
    case = Case.random(4)
    out = np.asarray(run_decode(case, TILES[1]))
    empty = np.asarray(case.lengths) == 0
    assert empty.any()
    assert not out[empty].any()
    nothing = replace(case, lengths=jnp.zeros_like(case.lengths))
    assert not np.asarray(run_decode(nothing, TILES[1])).any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_append_writes_and_attends(shape: dict[str, Any]) -> None:
    case = Case.random(5, room=1, **shape)
    k, v = case.new_tokens(6)
    q, k_pages, v_pages, page_table, lengths = case.arrays
    call = partial(triton.append_and_decode, tile=TILES[1], interpret=True)
    out, pool = jax.jit(call)(q, k, v, (k_pages, v_pages), page_table, lengths)
    after = append(case, k, v)
    assert relative_error(out, attend(after)) < TOLERANCE[q.dtype.name]
    for pages, expected in zip(pool, (after.k_pages, after.v_pages), strict=True):
        # As float32: NumPy knows no NaN in bfloat16.
        np.testing.assert_array_equal(
            np.asarray(pages, np.float32), np.asarray(expected, np.float32)
        )


def test_what_it_cannot_take_is_said() -> None:
    for group, width in ((17, 64), (4, 264), (4, 40)):
        case = Case.random(7, group=group, width=width)
        with pytest.raises(NotImplementedError):
            run_decode(case, TILES[0])
    case = Case.random(7)
    mixed = replace(case, q=case.q.astype(jnp.bfloat16))
    with pytest.raises(NotImplementedError, match="bfloat16"):
        run_decode(mixed, TILES[0])
