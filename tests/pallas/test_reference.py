"""Ragged decode attention in jnp, the oracle of the kernels, against NumPy in float64."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fairkv_jax.pallas.ragged_decode import reference
from tests.pallas.oracle import Case, attend

ragged_decode = jax.jit(reference.ragged_decode)


def make(
    lengths: np.ndarray, page_size: int, max_pages: int, *, group=2, width=16, gain=1.0
) -> Case:
    """Random arrays; pages that no length reaches, and the tails of those it does, hold NaN."""
    rng = np.random.default_rng(lengths.size + page_size)
    num_pages = lengths.size * max_pages + 3
    q = gain * rng.standard_normal((*lengths.shape, group, width)).astype(np.float32)
    k, v = rng.standard_normal((2, num_pages, page_size, width)).astype(np.float32)
    table = rng.permutation(num_pages)[: lengths.size * max_pages].astype(np.int32)
    table = table.reshape(*lengths.shape, max_pages)
    used = np.zeros((num_pages, page_size), bool)
    for where in np.ndindex(lengths.shape):
        token = np.arange(int(lengths[where]))
        used[table[where][token // page_size], token % page_size] = True
    k[~used] = v[~used] = np.nan
    return Case(*map(jnp.asarray, (q, k, v, table, lengths.astype(np.int32))))


def check(case: Case, atol: float = 2e-6) -> None:
    out = np.asarray(ragged_decode(*case.arrays))
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, attend(case), rtol=1e-5, atol=atol)


@pytest.mark.parametrize("page_size", [8, 16, 64, 128])
def test_lengths_around_page_and_table_ends(page_size: int):
    full = 5 * page_size
    lengths = [0, 1, page_size - 1, page_size, page_size + 1, full - 1, full, 0]
    check(make(np.array(lengths).reshape(4, 2), page_size, max_pages=5))


@pytest.mark.parametrize("seed", range(4))
def test_random_lengths(seed: int):
    """More tiles than one chunk holds; most rows are not owned."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 40 * 16 + 1, (6, 4)) * (rng.random((6, 4)) < 0.6)
    check(make(lengths, page_size=16, max_pages=40))


def test_nothing_owned_gives_zeros():
    out = ragged_decode(*make(np.zeros((3, 2), int), page_size=8, max_pages=2).arrays)
    assert not np.asarray(out).any()


def test_one_row_may_own_everything():
    lengths = np.zeros((4, 3), int)
    lengths[2, 1] = 64 * 40
    check(make(lengths, page_size=64, max_pages=40))


def test_large_scores_do_not_overflow():
    """Scores of several hundred: only the running maximum keeps the exponentials finite."""
    lengths = np.array([[200, 3], [64, 65]])
    check(make(lengths, page_size=16, max_pages=13, gain=200.0), atol=2e-3)


@pytest.mark.parametrize(("group", "width"), [(1, 64), (3, 64), (8, 128)])
def test_groups_and_widths(group: int, width: int):
    lengths = np.array([[70, 0], [129, 5]])
    check(make(lengths, page_size=16, max_pages=9, group=group, width=width))


def test_bfloat16_pages_are_read_in_float32():
    case = make(np.array([[40, 130]]), page_size=16, max_pages=9)
    k_pages, v_pages = (x.astype(jnp.bfloat16) for x in (case.k_pages, case.v_pages))
    check(replace(case, k_pages=k_pages, v_pages=v_pages))


def test_pages_may_be_shared_and_in_any_order():
    """Tables are only read: two rows with the same pages, one of them reversed."""
    case = make(np.array([[32], [32]]), page_size=8, max_pages=4)
    table = np.stack([case.page_table[0], case.page_table[0, :, ::-1]])
    check(replace(case, page_table=jnp.asarray(table)))
