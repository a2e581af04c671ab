"""StreamingLLM (Xiao et al., 2023): the first tokens, the sinks, and the most recent ones."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fairkv_jax.compress.contract import FromKeysAndValues, Scores, Stats


@dataclass(frozen=True)
class Recency(FromKeysAndValues):
    """Scores each token by its position, so that later tokens are more important."""

    num_sinks: int = 4
    window: int = 0
    """No window is needed, since the most recent tokens have the highest scores."""

    def score(
        self,
        stats: Stats,
        k: Float[Array, "C T H"],
        v: Float[Array, "C T H"],
        length: Int[Array, ""],
        budgets: Int[Array, "C"],
    ) -> Scores:
        num_slots, num_tokens, _ = k.shape
        positions = jnp.arange(num_tokens, dtype=jnp.float32)
        return Scores(jnp.broadcast_to(positions, (num_slots, num_tokens)))
