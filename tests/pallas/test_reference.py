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
    lengths: np.ndarray, page_size: int, *, num_queries=1, group=2, head_dim=16, gain=1.0
) -> Case:
    """Random arrays; pages that no length reaches, and the tails of those it does, hold NaN."""
    rng = np.random.default_rng(lengths.size + page_size)
    batch, slots = lengths.shape
    q = gain * rng.standard_normal((batch, num_queries, slots, group, head_dim))
    return Case.of(rng, q, lengths, page_size)


def check(case: Case, atol: float = 2e-6) -> None:
    out = np.asarray(ragged_decode(*case.arrays))
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, attend(case), rtol=1e-5, atol=atol)


@pytest.mark.parametrize("page_size", [8, 16, 64, 128])
def test_lengths_around_page_and_table_ends(page_size: int):
    full = 5 * page_size
    lengths = [0, 1, page_size - 1, page_size, page_size + 1, full - 1, full, 0]
    check(make(np.array(lengths).reshape(4, 2), page_size))


@pytest.mark.parametrize("seed", range(4))
def test_random_lengths(seed: int):
    """More tiles than one chunk holds; most rows are not owned."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 40 * 16 + 1, (6, 4)) * (rng.random((6, 4)) < 0.6)
    check(make(lengths, page_size=16))


def test_nothing_owned_gives_zeros():
    out = ragged_decode(*make(np.zeros((3, 2), int), page_size=8).arrays)
    assert not np.asarray(out).any()


def test_one_row_may_own_everything():
    lengths = np.zeros((4, 3), int)
    lengths[2, 1] = 64 * 40
    check(make(lengths, page_size=64))


def test_large_scores_do_not_overflow():
    """Scores of several hundred, whose exponentials only the running maximum keeps finite."""
    lengths = np.array([[200, 3], [64, 65]])
    check(make(lengths, page_size=16, gain=200.0), atol=2e-3)


@pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (3, 64), (8, 128)])
def test_groups_and_head_dims(group: int, head_dim: int):
    lengths = np.array([[70, 0], [129, 5]])
    check(make(lengths, page_size=16, group=group, head_dim=head_dim))


def test_bfloat16_pages_are_read_in_float32():
    case = make(np.array([[40, 130]]), page_size=16)
    k_pages, v_pages = (x.astype(jnp.bfloat16) for x in (case.k_pages, case.v_pages))
    check(replace(case, k_pages=k_pages, v_pages=v_pages))


@pytest.mark.parametrize("num_queries", [1, 2, 5, 16])
@pytest.mark.parametrize("page_size", [8, 64])
def test_queries_are_causal_among_themselves(num_queries: int, page_size: int):
    """Lengths around the queries' own number, where they are the whole row, and around tiles."""
    edges = [0, num_queries, num_queries + 1, 63, 64, 65, 64 + num_queries, 200]
    lengths = np.array([0 if edge < num_queries else edge for edge in edges]).reshape(4, 2)
    check(make(lengths, page_size, num_queries=num_queries, group=3))


def test_a_query_before_the_first_token_gives_zeros():
    """Fewer tokens than queries: the first queries see nothing."""
    case = make(np.array([[2, 70]]), page_size=8, num_queries=4)
    check(case)
    assert not np.asarray(ragged_decode(*case.arrays))[0, :2, 0].any()
