"""The suite that every backend passes, interpreted on CPU, against float64 NumPy."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fairkv_jax.pallas import ragged_decode as ops
from fairkv_jax.pallas.ragged_decode import Device, PageTable
from fairkv_jax.pallas.ragged_decode.mosaic_pipeline import INTERPRETER
from fairkv_jax.pallas.ragged_decode.registry import IMPLEMENTATIONS
from tests.pallas.oracle import Case, append, assert_same_pages, attend, relative_error

CPU = Device("cpu", "cpu")
SHAPE: dict[str, Any] = {"group": 2, "head_dim": 64, "max_pages": 9, "dtype": "bfloat16"}
TOLERANCE = 1e-2

pytestmark = pytest.mark.parametrize(
    "backend",
    [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                name == "mosaic" and INTERPRETER is None,
                reason="this JAX cannot interpret Mosaic GPU kernels",
            ),
        )
        for name in IMPLEMENTATIONS
    ],
)


def decode(case: Case, backend: str) -> jax.Array:
    """Jitted, so that the layer is traced, as in a decode step."""
    return jax.jit(partial(ops.ragged_decode, backend=backend, device=CPU))(*case.arrays)


def append_and_decode(case: Case, k: jax.Array, v: jax.Array, backend: str) -> tuple[Any, Any]:
    call = partial(ops.append_and_decode, backend=backend, device=CPU)
    return jax.jit(call)(case.q, k, v, case.pool, case.page_table, case.lengths, case.layer)


@pytest.mark.parametrize("layers", [None, 3])
def test_decode_agrees_with_float64(backend: str, layers: int | None) -> None:
    case = Case.random(1, layers=layers, **SHAPE)
    out = decode(case, backend)
    assert relative_error(out, attend(case)) < TOLERANCE
    empty = case.lengths_here == 0
    assert empty.any()
    assert not np.asarray(out, np.float32).transpose(0, 2, 1, 3, 4)[empty].any()


@pytest.mark.parametrize("layers", [None, 2])
def test_append_writes_and_attends(backend: str, layers: int | None) -> None:
    case = Case.random(2, layers=layers, room=1, **SHAPE)
    k, v = case.new_tokens(3)
    out, pool = append_and_decode(case, k, v, backend)
    after = append(case, k, v)
    assert relative_error(out, attend(after)) < TOLERANCE
    assert_same_pages(pool, after)


def test_slots_may_share_entries(backend: str) -> None:
    """Page tables are only read: here all slots of a row read the same entries."""
    case = Case.random(4, batch=2, slots=2, **SHAPE)
    longest = jnp.asarray(case.lengths).argmax(1)
    rows = jnp.arange(2)
    starts, lengths = (
        jnp.repeat(x[rows, longest][:, None], 2, axis=1)
        for x in (case.page_table.starts, case.lengths)
    )
    case = replace(case, page_table=PageTable(case.page_table.pages, starts), lengths=lengths)
    assert relative_error(decode(case, backend), attend(case)) < TOLERANCE


def test_a_length_beyond_the_list_reads_the_last_entry(backend: str) -> None:
    """Nothing outside the list is read, whatever the lengths and starts are."""
    case = Case.random(5, batch=1, slots=1, **SHAPE)
    pages = case.page_table.pages[1:10]
    beyond = replace(
        case,
        page_table=PageTable(pages, jnp.full((1, 1), 7, jnp.int32)),
        lengths=jnp.full((1, 1), 100, jnp.int32),
    )
    clipped = pages[jnp.minimum(7 + jnp.arange(9), 8)]
    padded = replace(beyond, page_table=PageTable(clipped, jnp.zeros((1, 1), jnp.int32)))
    assert relative_error(decode(beyond, backend), attend(padded)) < TOLERANCE


def test_a_token_beyond_the_list_is_not_written(backend: str) -> None:
    case = Case.random(6, batch=1, slots=1, **SHAPE)
    page_size = case.k_pages.shape[1]
    full = PageTable(case.page_table.pages[1:4], jnp.zeros((1, 1), jnp.int32))
    case = replace(case, page_table=full, lengths=jnp.full((1, 1), 3 * page_size, jnp.int32))
    _, pool = append_and_decode(case, *case.new_tokens(7), backend)
    assert_same_pages(pool, case)


@pytest.mark.parametrize("num_queries", [2, 5, 16])
def test_queries_are_causal_among_themselves(backend: str, num_queries: int) -> None:
    """The kernels take one query for now; then they say so, and dispatch goes on."""
    case = Case.random(8, num_queries=num_queries, layers=2, room=16, **SHAPE)
    k, v = case.new_tokens(9)
    if backend != "reference":
        for call in (partial(decode, case), partial(append_and_decode, case, k, v)):
            with pytest.raises(NotImplementedError, match=f"{num_queries} query tokens per row"):
                call(backend)
        return
    assert relative_error(decode(case, backend), attend(case)) < TOLERANCE
    out, pool = append_and_decode(case, k, v, backend)
    after = append(case, k, v)
    assert relative_error(out, attend(after)) < TOLERANCE
    assert_same_pages(pool, after)


@pytest.mark.parametrize("layers", [None, 3])
def test_int8_pages_are_read_with_their_scales(backend: str, layers: int | None) -> None:
    case = Case.random(10, layers=layers, **SHAPE).quantized()
    assert relative_error(decode(case, backend), attend(case)) < TOLERANCE


def test_appended_tokens_are_rounded_to_int8_as_the_formula_says(backend: str) -> None:
    """Byte for byte, and nothing else of the pool changes, in particular no scale of the page."""
    case = Case.random(11, layers=2, room=1, **SHAPE).quantized()
    k, v = case.new_tokens(12)
    k = k.at[0].set(0)  # zeros have the scale 0
    out, pool = append_and_decode(case, k, v, backend)
    after = append(case, k, v)
    assert relative_error(out, attend(after)) < TOLERANCE
    assert_same_pages(pool, after)
