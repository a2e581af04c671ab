"""The attention functions that prefill and decode inject into the model."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fairkv_jax.pallas.ragged_decode import AUTO, Device, PageTable, Pool, append_and_decode

KEY_BLOCK = 256
"""Keys that a block of a prompt's queries is multiplied with at a time."""

Softmax = tuple[Float[Array, "*C q H"], Float[Array, "*C q"], Float[Array, "*C q"]]
"""A running softmax in float32: the unnormalised output acc, the maximum m, the sum of weights l.

Over several sets of keys, it merges them by the log-sum-exp rule (Dao et al., 2022).
"""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedPrefix:
    """The compressed keys and values that precede a prompt's suffix, in one layer's pages.

    The slots may hold different numbers of tokens, or none. Their keys are rotated already, and
    every token of the suffix sees all of them.
    """

    pool: Pool
    page_table: PageTable
    """With `starts` [C]."""
    lengths: Int[Array, "C"]


def attend_to_prompt(
    q: Float[Array, "b C G H"],
    k: Float[Array, "C T H"],
    v: Float[Array, "C T H"],
    start: Int[Array, ""],
    prefix: PagedPrefix | None = None,
    begins: Int[Array, "b"] | None = None,
) -> Float[Array, "b C G H"]:
    """Attention of b tokens of a prompt, from token `start` on, over the prompt up to each of them.

    With `prefix`, k and v are those of the prompt's suffix, `start` counts from the suffix's first
    token, and every query also attends over the whole prefix.

    With `begins`, several prompts are packed, one after the other: a query sees no token before its
    own prompt's first one, whose index this is. Blocks of keys that no query sees are not read.

    The sums are in float32. Memory follows the block of queries and not the prompt, and keys that
    come after the block are never read. T is at most `KEY_BLOCK`, or a multiple of it.
    """
    num_queries, slots, group, head_dim = q.shape
    queries = q.transpose(1, 2, 0, 3).reshape(slots, group * num_queries, head_dim)
    query_at = jnp.tile(start + jnp.arange(num_queries), group)[:, None]
    size = min(KEY_BLOCK, k.shape[1])

    def add(i: Array, softmax: Softmax) -> Softmax:
        keys, values = (jax.lax.dynamic_slice_in_dim(x, i * size, size, 1) for x in (k, v))
        key_at = i * size + jnp.arange(size)
        is_seen = key_at <= query_at
        if begins is not None:
            is_seen &= key_at >= jnp.tile(begins, group)[:, None]
        return _add_keys(softmax, queries, keys, values, is_seen)

    nothing = jnp.zeros(queries.shape[:2])
    softmax = jnp.zeros(queries.shape), nothing - jnp.inf, nothing
    if prefix is not None:
        softmax = _add_prefix(softmax, queries, prefix)
    first = 0 if begins is None else begins[0] // size
    blocks = (start + num_queries - 1) // size + 1
    acc, _, l = jax.lax.fori_loop(first, blocks, add, softmax)
    out = (acc / l[..., None]).astype(q.dtype).reshape(slots, group, num_queries, head_dim)
    return out.transpose(2, 0, 1, 3)


def _add_prefix(softmax: Softmax, queries: Float[Array, "C q H"], prefix: PagedPrefix) -> Softmax:
    """Adds each slot's prefix, slot after slot: the time follows the tokens, not the longest slot.

    The maximum of a slot without a prefix remains infinite.
    """
    page_size, head_dim = prefix.pool.k_pages.shape[1:]
    num_pages = max(1, KEY_BLOCK // page_size)
    size = num_pages * page_size

    def add_slot(slot: tuple[Softmax, Array, Array, Array]) -> Softmax:
        softmax, queries, first_entry, length = slot

        def add(i: Array, softmax: Softmax) -> Softmax:
            page_at = i * num_pages + jnp.arange(num_pages)
            pages = prefix.page_table.entries(first_entry, page_at)
            is_token = i * size + jnp.arange(size) < length
            read = prefix.pool.read(pages, queries.dtype)
            keys, values = (x.reshape(size, head_dim) for x in read)
            values = jnp.where(is_token[:, None], values, 0)  # those past the length may be NaN
            return _add_keys(softmax, queries, keys, values, is_token)

        return jax.lax.fori_loop(0, -(-length // size), add, softmax)

    slots = softmax, queries, prefix.page_table.starts, prefix.lengths
    return jax.lax.map(add_slot, slots)


def _add_keys(
    softmax: Softmax,
    queries: Float[Array, "*C q H"],
    keys: Float[Array, "*C s H"],
    values: Float[Array, "*C s H"],
    is_seen: Bool[Array, "#q s"],
) -> Softmax:
    """Adds a block of keys. The maximum of a query that has seen none yet remains infinite."""
    acc, m, l = softmax
    scores = _product("...qh,...sh->...qs", queries, keys) * queries.shape[-1] ** -0.5
    scores = jnp.where(is_seen, scores, -jnp.inf)
    new_m = jnp.maximum(m, scores.max(-1))
    finite = jnp.where(new_m > -jnp.inf, new_m, 0)
    weights = jnp.exp(scores - finite[..., None])
    decay = jnp.exp(m - finite)
    update = _product("...qs,...sh->...qh", weights.astype(values.dtype), values)
    return acc * decay[..., None] + update, new_m, l * decay + weights.sum(-1)


def _product(subscripts: str, left: Array, right: Array) -> Array:
    return jnp.einsum(subscripts, left, right, preferred_element_type=jnp.float32)


def append_and_attend(
    q: Float[Array, "B C G H"],
    k: Float[Array, "B C H"],
    v: Float[Array, "B C H"],
    pool: Pool,
    layer: Int[Array, ""],
    *,
    page_table: PageTable,
    lengths: Int[Array, "L B C"],
    backend: str = AUTO,
    device: Device | None = None,
) -> tuple[Float[Array, "B C G H"], Pool, None]:
    """Writes each owned row's new key and value to its page, then attends over the row.

    `lengths` counts the tokens before, in all layers. A row that a slot does not own has length 0:
    nothing is written, and its output is zero.
    """
    out, pool = append_and_decode(
        q[:, None],
        k[:, None],
        v[:, None],
        pool,
        page_table,
        lengths,
        layer,
        backend=backend,
        device=device,
    )
    return out[:, 0], pool, None
