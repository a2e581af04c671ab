"""Attention of prefill and decode against NumPy."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fairkv_jax.attention import PagedPrefix, append_and_attend, attend_to_prompt
from fairkv_jax.pallas.ragged_decode import PageTable, Pool
from tests.oracle.forward import attention
from tests.pallas.oracle import quantize

HEADS, GROUP, WIDTH = 2, 3, 16


@pytest.mark.parametrize(
    ("num_tokens", "block"), [(1, 1), (32, 32), (256, 32), (255, 255), (512, 128), (768, 384)]
)
def test_attention_over_a_prompt(num_tokens: int, block: int):
    """Block by block, around the ends of the blocks of keys; what comes later is never read."""
    rng = np.random.default_rng(num_tokens)
    q = rng.standard_normal((num_tokens, HEADS, GROUP, WIDTH), dtype=np.float32)
    k, v = rng.standard_normal((2, HEADS, num_tokens, WIDTH), dtype=np.float32)
    q_NTH = q.reshape(num_tokens, -1, WIDTH).transpose(1, 0, 2).astype(np.float64)
    want = attention(q_NTH, k.astype(np.float64), v.astype(np.float64))
    want = want.transpose(1, 0, 2).reshape(q.shape)
    is_past = np.arange(num_tokens)[:, None]
    for start in range(0, num_tokens, block):
        here = slice(start, start + block)
        keys, values = (np.where(is_past < start + block, x, 9.0) for x in (k, v))
        out = jax.jit(attend_to_prompt)(q[here], keys, values, start)
        np.testing.assert_allclose(out, want[here], atol=5e-6)


@pytest.mark.parametrize(("lengths", "block"), [((1, 5, 26), 32), ((300, 1, 211, 256), 256)])
def test_prompts_in_a_row_do_not_see_each_other(lengths: tuple[int, ...], block: int):
    """Also where a query sees nothing of the first blocks of keys."""
    rng, num_tokens = np.random.default_rng(block), sum(lengths)
    q = rng.standard_normal((num_tokens, HEADS, GROUP, WIDTH), dtype=np.float32)
    k, v = rng.standard_normal((2, HEADS, num_tokens, WIDTH), dtype=np.float32)
    ends = np.cumsum(lengths)
    begins = np.repeat(ends - lengths, lengths).astype(np.int32)
    want = np.empty_like(q)
    for start, end in zip(ends - lengths, ends, strict=True):
        own = slice(start, end)
        q_NTH = q[own].reshape(end - start, -1, WIDTH).transpose(1, 0, 2).astype(np.float64)
        out = attention(q_NTH, k[:, own].astype(np.float64), v[:, own].astype(np.float64))
        want[own] = out.transpose(1, 0, 2).reshape(q[own].shape)
    for start in range(0, num_tokens, block):
        here = slice(start, start + block)
        out = jax.jit(attend_to_prompt)(q[here], k, v, start, None, begins[here])
        np.testing.assert_allclose(out, want[here], atol=5e-6)


@pytest.mark.parametrize("page_size", [16, 512])
@pytest.mark.parametrize(
    ("num_tokens", "block", "int8"),
    [(1, 1, False), (255, 255, False), (512, 128, False), (255, 255, True)],
)
def test_attention_over_a_suffix_behind_a_ragged_prefix(
    num_tokens: int, block: int, page_size: int, *, int8: bool
):
    """Lengths of none, one, around a block of keys, and of several blocks with a part."""
    rng = np.random.default_rng(num_tokens + page_size)
    lengths = np.array([0, 1, 255, 256, 257, 700])
    slots = len(lengths)
    counts = -(-lengths // page_size)
    starts = np.cumsum(counts) - counts
    pages = rng.permutation(counts.sum() + 1)[1:].astype(np.int32)
    pool: Any = np.full((2, counts.sum() + 1, page_size, WIDTH), np.nan, np.float32)
    scales: Any = np.full(pool.shape[:3], np.nan, ml_dtypes.bfloat16)
    if int8:
        pool = np.full(pool.shape, 99, np.int8)
    prefixes = []
    for first, length in zip(starts, lengths, strict=True):
        token = np.arange(length)
        at = pages[first + token // page_size], token % page_size
        prefixes.append(rng.standard_normal((2, length, WIDTH), dtype=np.float32))
        if int8:
            pool[:, *at], scales[:, *at] = quantize(prefixes[-1])
            prefixes[-1] = pool[:, *at] * scales[:, *at][..., None].astype(np.float32)
        else:
            pool[:, *at] = prefixes[-1]
    prefix = PagedPrefix(
        Pool(
            jnp.asarray(pool[0]),
            jnp.asarray(pool[1]),
            (jnp.asarray(scales[0]), jnp.asarray(scales[1])) if int8 else None,
        ),
        PageTable(jnp.asarray(pages), jnp.asarray(starts, jnp.int32)),
        jnp.asarray(lengths, jnp.int32),
    )
    q = rng.standard_normal((num_tokens, slots, GROUP, WIDTH), dtype=np.float32)
    k, v = rng.standard_normal((2, slots, num_tokens, WIDTH), dtype=np.float32)
    want = suffix_attention(q, k, v, prefixes)
    for start in range(0, num_tokens, block):
        here = slice(start, start + block)
        out = jax.jit(attend_to_prompt)(q[here], k, v, start, prefix)
        np.testing.assert_allclose(out, want[here], atol=5e-6)


def suffix_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, prefixes: list[np.ndarray]
) -> np.ndarray:
    """One softmax in float64 over a slot's prefix and then the suffix up to each token."""
    num_tokens, slots, group, width = q.shape
    out = np.zeros(q.shape)
    for slot in range(slots):
        keys, values = (
            np.concatenate([prefixes[slot][i], x[slot]]).astype(np.float64)
            for i, x in enumerate((k, v))
        )
        is_hidden = np.arange(len(keys)) > prefixes[slot].shape[1] + np.arange(num_tokens)[:, None]
        for head in range(group):
            scores = q[:, slot, head].astype(np.float64) @ keys.T / np.sqrt(width)
            weights = np.exp(np.where(is_hidden, -np.inf, scores))
            out[:, slot, head] = weights / weights.sum(1, keepdims=True) @ values
    return out


def test_append_writes_owned_rows_only_and_attends_over_the_new_token():
    rng = np.random.default_rng(0)
    lengths = np.array([[5, 0], [8, 1]], np.int32)  # of pages of 8: the third opens a page
    table = np.array([[[3, 6], [0, 0]], [[2, 5], [7, 1]]], np.int32)
    pages = rng.standard_normal((2, 9, 8, WIDTH), dtype=np.float32)
    q = rng.standard_normal((2, 2, GROUP, WIDTH), dtype=np.float32)
    k, v = rng.standard_normal((2, 2, 2, WIDTH), dtype=np.float32)
    # The first of two layers holds other rows, to which nothing is appended.
    lists = PageTable.from_dense(jnp.stack([table[::-1], table]))
    all_lengths = jnp.stack([lengths + 1, lengths])
    pool = Pool(jnp.asarray(pages[0]), jnp.asarray(pages[1]))
    call = partial(append_and_attend, page_table=lists, lengths=all_lengths)
    out, got, _ = jax.jit(call)(q, k, v, pool, 1)
    expected = pages.copy()
    for row, slot, page, at in ((0, 0, 3, 5), (1, 0, 5, 0), (1, 1, 7, 1)):
        expected[0, page, at], expected[1, page, at] = k[row, slot], v[row, slot]
    np.testing.assert_array_equal(np.stack(jax.tree.leaves(got)), expected)
    assert not np.asarray(out[0, 1]).any()
    for row, slot in ((0, 0), (1, 0), (1, 1)):
        keys, values = (
            np.concatenate(x[table[row, slot]])[: lengths[row, slot] + 1] for x in expected
        )
        scores = q[row, slot] @ keys.T / np.sqrt(WIDTH)
        weights = np.exp(scores - scores.max(1, keepdims=True))
        want = weights / weights.sum(1, keepdims=True) @ values
        np.testing.assert_allclose(out[row, slot], want, atol=1e-5)
