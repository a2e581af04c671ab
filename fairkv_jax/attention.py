"""The attend functions that prefill and decode inject into the model."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fairkv_jax.pallas.ragged_decode import AUTO, Device, append_and_decode

BLOCK_TOKENS = 256
"""Queries, and keys, of a prompt that meet at a time."""


def causal_attention(
    q: Float[Array, "T C G H"], k: Float[Array, "T C H"], v: Float[Array, "T C H"]
) -> Float[Array, "T C G H"]:
    """Causal attention of a prompt over itself, block by block with a running softmax in float32.

    Memory grows with the block and not with the prompt, and blocks above the diagonal are never
    computed (Dao et al., 2022).
    """
    num_tokens, slots, group, width = q.shape
    size = min(BLOCK_TOKENS, num_tokens)
    # Padding keys come after every query, so that nobody attends to them.
    blocks = -(-num_tokens // size)
    padding = [(0, blocks * size - num_tokens), (0, 0), (0, 0)]
    queries = jnp.pad(q, [*padding, (0, 0)]).reshape(blocks, size, slots, group, width)
    queries = queries.transpose(0, 2, 3, 1, 4).reshape(blocks, slots, group * size, width)
    keys = jnp.pad(k, padding).reshape(blocks, size, slots, width).swapaxes(1, 2)
    values = jnp.pad(v, padding).reshape(blocks, size, slots, width).swapaxes(1, 2)
    token = jnp.arange(size)
    # Within a block of queries and keys: of G times `size` queries, which keys are past.
    is_past = jnp.tile(token <= token[:, None], (group, 1))

    def attend(at: Array) -> Float[Array, "C Q H"]:
        def add(i: Array, running: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            total, peak, mass = running
            scores = _product("cqh,csh->cqs", queries[at], keys[i]) * width**-0.5
            scores = jnp.where(is_past | (i < at), scores, -jnp.inf)
            new_peak = jnp.maximum(peak, scores.max(-1))
            weights = jnp.exp(scores - new_peak[..., None])
            decay = jnp.exp(peak - new_peak)
            update = _product("cqs,csh->cqh", weights.astype(v.dtype), values[i])
            return (
                total * decay[..., None] + update,
                new_peak,
                mass * decay + weights.sum(-1),
            )

        nothing = jnp.zeros((slots, group * size))
        start = jnp.zeros((slots, group * size, width)), nothing - jnp.inf, nothing
        # The first block holds a past key for every query, so that no peak stays infinite.
        total, _, mass = jax.lax.fori_loop(0, at + 1, add, start)
        return (total / mass[..., None]).astype(q.dtype)

    out = jax.lax.map(attend, jnp.arange(blocks)).reshape(blocks, slots, group, size, width)
    return out.transpose(0, 3, 1, 2, 4).reshape(-1, slots, group, width)[:num_tokens]


def _product(subscripts: str, left: Array, right: Array) -> Array:
    return jnp.einsum(subscripts, left, right, preferred_element_type=jnp.float32)


def append_and_attend(
    q: Float[Array, "B C G H"],
    k: Float[Array, "B C H"],
    v: Float[Array, "B C H"],
    pool: tuple[Float[Array, "pages page_size H"], Float[Array, "pages page_size H"]],
    layer: tuple[Int[Array, "B C max_pages"], Int[Array, "B C"]],
    *,
    backend: str = AUTO,
    device: Device | None = None,
) -> tuple[Float[Array, "B C G H"], tuple[Array, Array], None]:
    """Writes each owned row's new key and value to its page, then attends over the row.

    Rows that a slot does not own have length 0: nothing is written and zeros come out.
    """
    page_table, lengths = layer
    out, pool = append_and_decode(
        q, k, v, pool, page_table, lengths, backend=backend, device=device
    )
    return out, pool, None
