"""Paged decode attention in float64 NumPy, written from the formula, and random cases for it."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Case:
    """Inputs in their own type; whatever no row owns holds NaN."""

    q: jax.Array
    k_pages: jax.Array
    v_pages: jax.Array
    page_table: jax.Array
    lengths: jax.Array

    @classmethod
    def random(
        cls,
        seed: int,
        *,
        batch: int = 3,
        slots: int = 2,
        group: int = 4,
        width: int = 64,
        page_size: int = 16,
        max_pages: int = 8,
        dtype: str = "float32",
        room: int = 0,
    ) -> "Case":
        """Lengths at the edges first (the table less `room`, none, around a page, one)."""
        rng = np.random.default_rng(seed)
        pairs = batch * slots
        full = max_pages * page_size - room
        edges = [full, 0, page_size + 1, page_size, page_size - 1, 1]
        lengths = np.concatenate([edges, rng.integers(0, full + 1, pairs)])[:pairs]
        lengths = rng.permutation(lengths).reshape(batch, slots).astype(np.int32)
        num_pages = pairs * max_pages + 3
        table = rng.permutation(num_pages)[: pairs * max_pages]
        table = table.reshape(batch, slots, max_pages).astype(np.int32)
        pool = rng.standard_normal((2, num_pages, page_size, width))
        owned = np.zeros((num_pages, page_size), bool)
        for row, slot in np.ndindex(batch, slots):
            token = np.arange(int(lengths[row, slot]))
            owned[table[row, slot, token // page_size], token % page_size] = True
        pool[:, ~owned] = np.nan
        q = rng.standard_normal((batch, slots, group, width))
        q, k_pages, v_pages = (jnp.asarray(x, dtype) for x in (q, *pool))
        return cls(q, k_pages, v_pages, jnp.asarray(table), jnp.asarray(lengths))

    @property
    def arrays(self) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
        """In the order of the kernels' arguments."""
        return self.q, self.k_pages, self.v_pages, self.page_table, self.lengths

    def new_tokens(self, seed: int) -> tuple[jax.Array, jax.Array]:
        """A key and a value for every (row, slot)."""
        rng = np.random.default_rng(seed)
        shape = (*self.lengths.shape, self.q.shape[-1])
        k, v = rng.standard_normal((2, *shape))
        return jnp.asarray(k, self.q.dtype), jnp.asarray(v, self.q.dtype)


def attend(case: Case) -> np.ndarray:
    """softmax(q k^T / sqrt(H)) v of every (row, slot) over its own tokens; zeros without any."""
    q, k_pages, v_pages = (np.asarray(x, np.float64) for x in (case.q, case.k_pages, case.v_pages))
    table, lengths = np.asarray(case.page_table), np.asarray(case.lengths)
    page_size, out = k_pages.shape[1], np.zeros(q.shape)
    for row, slot in np.ndindex(*lengths.shape):
        token = np.arange(int(lengths[row, slot]))
        if not len(token):
            continue
        at = table[row, slot, token // page_size], token % page_size
        scores = q[row, slot] @ k_pages[at].T / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[row, slot] = weights / weights.sum(-1, keepdims=True) @ v_pages[at]
    return out


def append(case: Case, k: jax.Array, v: jax.Array) -> Case:
    """The case after every owned row's new token has been written behind its others."""
    k_pages, v_pages = np.array(case.k_pages), np.array(case.v_pages)
    table, lengths = np.asarray(case.page_table), np.asarray(case.lengths)
    page_size = k_pages.shape[1]
    for row, slot in np.argwhere(lengths > 0):
        length = int(lengths[row, slot])
        at = table[row, slot, length // page_size], length % page_size
        k_pages[at], v_pages[at] = k[row, slot], v[row, slot]
    lengths = jnp.asarray(lengths + (lengths > 0))
    return Case(case.q, jnp.asarray(k_pages), jnp.asarray(v_pages), case.page_table, lengths)


def relative_error(out: jax.Array, expected: np.ndarray) -> float:
    """|out - expected| / |expected| over all entries; NaN where any entry is NaN."""
    return float(np.linalg.norm(np.asarray(out, np.float64) - expected) / np.linalg.norm(expected))
