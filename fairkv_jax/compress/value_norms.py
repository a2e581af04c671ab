"""How much each token's value adds to the output of the attention block: norms of W_o v."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fairkv_jax.compress.contract import Chunk


def output_norms(chunk: Chunk, order: int) -> Float[Array, "C G b"]:
    """Returns the norm of W_o v for every query head; order 1 sums absolute values, 2 squares.

    One query head of a group after the other, since the outputs of all are large.
    """

    def of_query_head(w_o: Float[Array, "C H D"]) -> Float[Array, "C b"]:
        outputs = jnp.einsum("bch,chd->cbd", chunk.v, w_o).astype(jnp.float32)
        return jnp.linalg.norm(outputs, ord=order, axis=-1)

    return jnp.swapaxes(jax.lax.map(of_query_head, jnp.swapaxes(chunk.w_o, 0, 1)), 0, 1)
