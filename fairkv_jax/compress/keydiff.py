"""KeyDiff (Park et al., 2025): keys that are unlike the others are important."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fairkv_jax.compress.contract import FromKeysAndValues, Scores, Stats

_SMALLEST_NORM = 1e-12
"""Norms are at least this, so that a zero key has no direction instead of a NaN."""


@dataclass(frozen=True)
class KeyDiff(FromKeysAndValues):
    """Scores a key by -cos(key, mean of the normalised keys), after RoPE.

    A token takes the highest score within a window of `kernel` tokens around it, an odd number.
    """

    num_sinks: int = 0
    window: int = 0
    kernel: int = 1

    def score(
        self,
        stats: Stats,
        k: Float[Array, "C T H"],
        v: Float[Array, "C T H"],
        length: Int[Array, ""],
        budgets: Int[Array, "C"],
    ) -> Scores:
        directions = _normalized(k.astype(jnp.float32))
        is_prompt = (jnp.arange(k.shape[1]) < length)[:, None]
        mean = jnp.sum(jnp.where(is_prompt, directions, 0), 1) / length
        scores = -jnp.einsum("cth,ch->ct", directions, _normalized(mean))
        if self.kernel > 1:
            scores = jnp.where(is_prompt[:, 0], scores, -jnp.inf)
            window, strides = (1, self.kernel), (1, 1)
            scores = jax.lax.reduce_window(scores, -jnp.inf, jax.lax.max, window, strides, "same")
        return Scores(scores)


def _normalized(x: Float[Array, "*rows H"]) -> Float[Array, "*rows H"]:
    norms = jnp.sqrt(jnp.sum(x * x, -1, keepdims=True))
    return x / jnp.maximum(norms, _SMALLEST_NORM)
