"""Key norms (Devoto et al., 2024): keys of small norm get much attention, so they are kept."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fairkv_jax.compress.contract import FromKeysAndValues, Scores, Stats


@dataclass(frozen=True)
class KeyNorm(FromKeysAndValues):
    """Scores a key by -|key|."""

    num_sinks: int = 0
    window: int = 0

    def score(
        self,
        stats: Stats,
        k: Float[Array, "C T H"],
        v: Float[Array, "C T H"],
        length: Int[Array, ""],
        budgets: Int[Array, "C"],
    ) -> Scores:
        k = k.astype(jnp.float32)
        return Scores(-jnp.sqrt(jnp.sum(k * k, -1)))
