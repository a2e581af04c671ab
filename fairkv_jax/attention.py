"""The attend functions that prefill and decode inject into the model."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fairkv_jax.pallas.ragged_decode import ragged_decode

MIN_QUERY_CHUNK = 256
MAX_QUERY_CHUNKS = 16


def causal_attention(
    q: Float[Array, "T C G H"], k: Float[Array, "T C H"], v: Float[Array, "T C H"]
) -> Float[Array, "T C G H"]:
    """Causal attention of a prompt over itself, with the softmax in float32.

    Queries are taken in chunks, each over the keys up to its own end: memory grows with chunk times
    prompt, and about half of the products, those above the diagonal, are never made.
    """
    num_tokens, slots, group, width = q.shape
    size = max(MIN_QUERY_CHUNK, -(-num_tokens // MAX_QUERY_CHUNKS))
    keys, values = k.swapaxes(0, 1), v.swapaxes(0, 1)

    def chunk(start: int) -> Float[Array, "t C G H"]:
        end = min(start + size, num_tokens)
        rows = end - start
        queries = q[start:end].transpose(1, 2, 0, 3).reshape(slots, group * rows, width)
        scores = jnp.einsum(
            "cqh,csh->cqs", queries, keys[:, :end], preferred_element_type=jnp.float32
        )
        is_past = jnp.arange(end) <= start + jnp.arange(rows)[:, None]
        scores = scores.reshape(slots, group, rows, end) * width**-0.5
        weights = jax.nn.softmax(jnp.where(is_past, scores, -jnp.inf), axis=-1)
        weights = weights.reshape(slots, group * rows, end).astype(v.dtype)
        out = jnp.einsum("cqs,csh->cqh", weights, values[:, :end])
        return out.reshape(slots, group, rows, width).transpose(2, 0, 1, 3)

    return jnp.concatenate([chunk(start) for start in range(0, num_tokens, size)])


def append_and_attend(
    q: Float[Array, "B C G H"],
    k: Float[Array, "B C H"],
    v: Float[Array, "B C H"],
    pool: tuple[Float[Array, "pages page_size H"], Float[Array, "pages page_size H"]],
    layer: tuple[Int[Array, "B C max_pages"], Int[Array, "B C"]],
) -> tuple[Float[Array, "B C G H"], tuple[Array, Array], None]:
    """Writes each owned row's new key and value to its page, then attends over the row.

    Rows that a slot does not own have length 0: nothing is written and zeros come out.
    """
    k_pages, v_pages = pool
    page_table, lengths = layer
    num_pages, page_size, _ = k_pages.shape
    owned = lengths > 0
    page = jnp.take_along_axis(page_table, (lengths // page_size)[..., None], -1)[..., 0]
    page = jnp.where(owned, page, num_pages)  # beyond the pool: dropped
    at = lengths % page_size
    k_pages = k_pages.at[page, at].set(k, mode="drop")
    v_pages = v_pages.at[page, at].set(v, mode="drop")
    out = ragged_decode(q, k_pages, v_pages, page_table, lengths + owned)
    return out, (k_pages, v_pages), None
