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
from tests.pallas.oracle import Case, append, assert_same_pages, attend, relative_error

TOLERANCE = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 1e-2}
SHAPES: list[dict[str, Any]] = [
    {"group": 1, "head_dim": 64, "batch": 1, "slots": 1},
    {"group": 3, "head_dim": 64, "page_size": 8, "max_pages": 20},
    {"group": 4, "head_dim": 128, "page_size": 64, "max_pages": 3},
    {"group": 8, "head_dim": 96, "dtype": "bfloat16"},
    {"group": 16, "head_dim": 256, "dtype": "bfloat16"},
    {"group": 2, "head_dim": 256, "dtype": "float16", "batch": 7},
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
def test_the_number_of_pieces_does_not_change_the_result(tile: TritonTile) -> None:
    case = Case.random(2, batch=5, slots=2, max_pages=11, layers=2)
    assert relative_error(run_decode(case, tile), attend(case)) < TOLERANCE["float32"]


def test_a_batch_without_tokens_is_zero() -> None:
    case = Case.random(4)
    nothing = replace(case, lengths=jnp.zeros_like(case.lengths))
    assert not np.asarray(run_decode(nothing, TILES[1])).any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_append_writes_and_attends(shape: dict[str, Any]) -> None:
    case = Case.random(5, room=1, **shape)
    k, v = case.new_tokens(6)
    lists = case.page_table, case.lengths, case.layer
    call = partial(triton.append_and_decode, tile=TILES[1], interpret=True)
    out, pool = jax.jit(call)(case.q, k, v, case.pool, *lists)
    after = append(case, k, v)
    assert relative_error(out, attend(after)) < TOLERANCE[case.q.dtype.name]
    assert_same_pages(pool, after)


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[3], SHAPES[5]], ids=str)
def test_int8_pages_of_queries_of_each_type(shape: dict[str, Any]) -> None:
    """Also of a head that is padded to a power of 2, whose padding no scale may reach."""
    case = Case.random(8, room=1, **shape).quantized()
    k, v = case.new_tokens(9)
    lists = case.page_table, case.lengths, case.layer
    call = partial(triton.append_and_decode, tile=TILES[1], interpret=True)
    out, pool = jax.jit(call)(case.q, k, v, case.pool, *lists)
    after = append(case, k, v)
    assert relative_error(out, attend(after)) < TOLERANCE[case.q.dtype.name]
    assert_same_pages(pool, after)


def test_inputs_that_it_cannot_take_are_named() -> None:
    for group, head_dim in ((17, 64), (4, 264), (4, 40)):
        case = Case.random(7, group=group, head_dim=head_dim)
        with pytest.raises(NotImplementedError):
            run_decode(case, TILES[0])
    case = Case.random(7)
    mixed = replace(case, q=case.q.astype(jnp.bfloat16))
    with pytest.raises(NotImplementedError, match="bfloat16"):
        run_decode(mixed, TILES[0])
