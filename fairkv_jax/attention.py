"""The attend functions that prefill and decode inject into the model."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fairkv_jax.pallas.ragged_decode import AUTO, Device, PageTable, Pool, append_and_decode

KEY_BLOCK = 256
"""Keys of a prompt that a block of its queries meets at a time."""


def attend_to_prompt(
    q: Float[Array, "b C G H"],
    k: Float[Array, "C T H"],
    v: Float[Array, "C T H"],
    start: Int[Array, ""],
) -> Float[Array, "b C G H"]:
    """Causal attention of a prompt's tokens from `start` on, with a running softmax in float32.

    Memory grows with the block of queries and not with the prompt, and keys that come after the
    block are never read (Dao et al., 2022). T is at most `KEY_BLOCK`, or a multiple of it.
    """
    num_queries, slots, group, width = q.shape
    size = min(KEY_BLOCK, k.shape[1])
    queries = q.transpose(1, 2, 0, 3).reshape(slots, group * num_queries, width)
    query_at = jnp.tile(start + jnp.arange(num_queries), group)[:, None]

    def add(i: Array, running: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        total, peak, mass = running
        keys, values = (jax.lax.dynamic_slice_in_dim(x, i * size, size, 1) for x in (k, v))
        scores = _product("cqh,csh->cqs", queries, keys) * width**-0.5
        scores = jnp.where(i * size + jnp.arange(size) <= query_at, scores, -jnp.inf)
        new_peak = jnp.maximum(peak, scores.max(-1))
        weights = jnp.exp(scores - new_peak[..., None])
        decay = jnp.exp(peak - new_peak)
        update = _product("cqs,csh->cqh", weights.astype(v.dtype), values)
        return total * decay[..., None] + update, new_peak, mass * decay + weights.sum(-1)

    nothing = jnp.zeros(queries.shape[:2])
    running = jnp.zeros(queries.shape), nothing - jnp.inf, nothing
    # The first keys hold a past one for every query, so that no peak stays infinite.
    blocks = (start + num_queries - 1) // size + 1
    total, _, mass = jax.lax.fori_loop(0, blocks, add, running)
    out = (total / mass[..., None]).astype(q.dtype).reshape(slots, group, num_queries, width)
    return out.transpose(2, 0, 1, 3)


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
