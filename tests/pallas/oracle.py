"""Paged decode attention in float64 NumPy, written from the formula, and random cases for it."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from fairkv_jax.pallas.ragged_decode import PageTable, Pool


@dataclass(frozen=True)
class Case:
    """Inputs in their own type; pages and list entries that no row owns hold NaN and -1."""

    q: jax.Array
    k_pages: jax.Array
    v_pages: jax.Array
    page_table: PageTable
    lengths: jax.Array
    layer: int | None = None
    scales: tuple[jax.Array, jax.Array] | None = None
    """Those of int8 pages; of tokens that no row owns they are NaN."""

    @classmethod
    def random(
        cls,
        seed: int,
        *,
        batch: int = 3,
        num_queries: int = 1,
        slots: int = 2,
        group: int = 4,
        head_dim: int = 64,
        page_size: int = 16,
        max_pages: int = 8,
        dtype: str = "float32",
        room: int = 0,
        layers: int | None = None,
    ) -> "Case":
        """Lengths at the edges first (`max_pages` pages less `room`, none, around a page, one).

        With `layers`, the arrays of all layers and the last one as the layer.
        """
        rng = np.random.default_rng(seed)
        pairs = batch * slots
        full = max_pages * page_size - room
        edges = [full, 0, page_size + 1, page_size, page_size - 1, 1]

        def draw() -> np.ndarray:
            lengths = np.concatenate([edges, rng.integers(0, full + 1, pairs)])[:pairs]
            return rng.permutation(lengths).reshape(batch, slots)

        lengths = draw() if layers is None else np.stack([draw() for _ in range(layers)])
        q = rng.standard_normal((batch, num_queries, slots, group, head_dim))
        return cls.of(rng, q, lengths, page_size, dtype=dtype, room=room)

    @classmethod
    def of(
        cls,
        rng: np.random.Generator,
        q: np.ndarray,
        lengths: np.ndarray,
        page_size: int,
        *,
        dtype: str = "float32",
        room: int = 0,
    ) -> "Case":
        """Pages for `lengths` [B,C] or [L,B,C] and `room` tokens more, in random order."""
        num_entries = -(-(lengths + room * (lengths > 0)) // page_size)
        num_pages = int(num_entries.sum()) + 3
        numbers = iter(rng.permutation(num_pages).tolist())
        # The lists lie in random order too, and entries that nobody uses between them.
        pages, starts = [-1], np.zeros(lengths.shape, np.int32)
        for index in rng.permutation(lengths.size):
            where = np.unravel_index(index, lengths.shape)
            starts[where] = len(pages)
            pages += [next(numbers) for _ in range(num_entries[where])] + [-1] * int(
                rng.integers(2)
            )
        pool = rng.standard_normal((2, num_pages, page_size, q.shape[-1]))
        owned = np.zeros((num_pages, page_size), bool)
        for where in np.ndindex(lengths.shape):
            token = np.arange(int(lengths[where]))
            owned[np.array(pages)[starts[where] + token // page_size], token % page_size] = True
        pool[:, ~owned] = np.nan
        queries, k_pages, v_pages = (jnp.asarray(x, dtype) for x in (q, *pool))
        table = PageTable(jnp.asarray(pages, jnp.int32), jnp.asarray(starts))
        layer = None if lengths.ndim == 2 else len(lengths) - 1
        counts = jnp.asarray(lengths, jnp.int32)
        return cls(queries, k_pages, v_pages, table, counts, layer)

    def quantized(self) -> "Case":
        """The case with its pages in int8; in tokens that no row owns, the values are 99."""
        wide = (np.asarray(pages, np.float32) for pages in (self.k_pages, self.v_pages))
        (k_pages, k_scales), (v_pages, v_scales) = (quantize(pages, nobody=99) for pages in wide)
        pages = jnp.asarray(k_pages), jnp.asarray(v_pages)
        scales = jnp.asarray(k_scales), jnp.asarray(v_scales)
        return replace(self, k_pages=pages[0], v_pages=pages[1], scales=scales)

    @property
    def pool(self) -> Pool:
        return Pool(self.k_pages, self.v_pages, self.scales)

    @property
    def arrays(self) -> tuple[Any, ...]:
        """In the order of the kernels' arguments; without scales, if there are none."""
        scales = () if self.scales is None else (self.scales,)
        lists = self.page_table, self.lengths, self.layer
        return self.q, self.k_pages, self.v_pages, *lists, *scales

    @property
    def lengths_here(self) -> np.ndarray:
        """[B, C] lengths in the case's layer."""
        lengths = np.asarray(self.lengths)
        return lengths if self.layer is None else lengths[self.layer]

    def new_tokens(self, seed: int) -> tuple[jax.Array, jax.Array]:
        """A key and a value for every (row, query, slot)."""
        rng = np.random.default_rng(seed)
        batch, num_queries, slots, _, head_dim = self.q.shape
        k, v = rng.standard_normal((2, batch, num_queries, slots, head_dim))
        return jnp.asarray(k, self.q.dtype), jnp.asarray(v, self.q.dtype)

    def places(self, row: int, slot: int, token: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The page and the place in it of tokens in the case's layer."""
        page_size = self.k_pages.shape[1]
        starts = np.asarray(self.page_table.starts)
        starts = starts if self.layer is None else starts[self.layer]
        entry = starts[row, slot] + token // page_size
        return np.asarray(self.page_table.pages)[entry], token % page_size


def quantize(x: np.ndarray, nobody: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """rint(x / s) of float32 vectors [..., H], with s = max|x| / 127 in bfloat16; `nobody` of NaN.

    In float32 as in the cache, so that not one value is rounded to the other side.
    """
    scales = (np.abs(x).max(-1) / np.float32(127)).astype(ml_dtypes.bfloat16)
    wide = scales.astype(np.float32)[..., None]
    values = np.rint(np.divide(x, wide, out=np.zeros_like(x), where=wide != 0))
    return np.where(np.isnan(values), nobody, values).astype(np.int8), scales


def attend(case: Case) -> np.ndarray:
    """softmax(q k^T / sqrt(H)) v of each query over the tokens up to its own; zeros without any."""
    q, k_pages, v_pages = (np.asarray(x, np.float64) for x in (case.q, case.k_pages, case.v_pages))
    if case.scales is not None:
        k_scales, v_scales = (np.asarray(x, np.float64)[..., None] for x in case.scales)
        k_pages, v_pages = k_pages * k_scales, v_pages * v_scales
    num_queries, out = q.shape[1], np.zeros(q.shape)
    for row, query, slot in np.ndindex(*q.shape[:3]):
        num_seen = int(case.lengths_here[row, slot]) - num_queries + 1 + query
        if num_seen <= 0:
            continue
        at = case.places(row, slot, np.arange(num_seen))
        scores = q[row, query, slot] @ k_pages[at].T / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[row, query, slot] = weights / weights.sum(-1, keepdims=True) @ v_pages[at]
    return out


def append(case: Case, k: jax.Array, v: jax.Array) -> Case:
    """The case after every owned row's new tokens have been written behind its others."""
    pages = [np.array(leaf) for leaf in jax.tree.leaves(case.pool)]
    new = [np.asarray(k), np.asarray(v)]
    if case.scales is not None:
        rounded = [quantize(x.astype(np.float32)) for x in new]
        new = [part[i] for i in range(2) for part in rounded]
    for row, slot in np.argwhere(case.lengths_here > 0):
        for query in range(k.shape[1]):
            at = case.places(row, slot, case.lengths_here[row, slot] + np.array(query))
            for leaf, tokens in zip(pages, new, strict=True):
                leaf[at] = tokens[row, query, slot]
    k_pages, v_pages, *scales = map(jnp.asarray, pages)
    lengths, here = np.array(case.lengths), case.lengths_here
    lengths[... if case.layer is None else case.layer] = here + k.shape[1] * (here > 0)
    return replace(
        case,
        k_pages=k_pages,
        v_pages=v_pages,
        scales=tuple(scales) or None,
        lengths=jnp.asarray(lengths),
    )


def assert_same_pages(pool: Pool, expected: Case) -> None:
    """Every entry of the pool is equal, NaN included, and so are the scales."""
    leaves, of_case = jax.tree.leaves(pool), jax.tree.leaves(expected.pool)
    for pages, wanted in zip(leaves, of_case, strict=True):
        # As float32: NumPy knows no NaN in bfloat16.
        np.testing.assert_array_equal(np.asarray(pages, np.float32), np.asarray(wanted, np.float32))


def relative_error(out: jax.Array, expected: np.ndarray) -> float:
    """|out - expected| / |expected| over all entries; NaN where any entry is NaN."""
    return float(np.linalg.norm(np.asarray(out, np.float64) - expected) / np.linalg.norm(expected))
