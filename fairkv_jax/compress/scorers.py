"""Scorers: how much each prompt key matters to each KV head."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fairkv_jax.config import KVConfig


@dataclass(frozen=True)
class PositionScorer:
    """StreamingLLM (Xiao et al., 2023): the first tokens, the sinks, then the most recent ones."""

    sinks: int = 4
    window: int = 0
    """No window of the prompt's end is protected: recency is the score itself."""

    def __call__(
        self,
        q: Float[Array, "C G w H"],
        k: Float[Array, "C T H"],
        length: Int[Array, ""],
        budget: Int[Array, ""],
    ) -> Float[Array, "C T"]:
        del q, length, budget
        num_slots, num_tokens, _ = k.shape
        position = jnp.arange(num_tokens)
        is_sink = position < self.sinks
        scores = jnp.where(is_sink, 2 * num_tokens, position).astype(jnp.float32)
        return jnp.broadcast_to(scores, (num_slots, num_tokens))


@dataclass(frozen=True)
class WindowAttention:
    """SnapKV (Li et al., 2024): the attention that the prompt's last queries pay to each key.

    Probabilities over all keys, in float32; the mean over the window's queries, pooled along the
    keys, averaged over the group. The window's own keys are left out of the pooling.
    """

    window: int
    pool: str
    kernel: int
    pool_first: bool

    @classmethod
    def from_config(cls, config: KVConfig) -> "WindowAttention":
        return cls(config.window, config.pooling, config.kernel, config.pool_first)

    def __call__(
        self,
        q: Float[Array, "C G w H"],
        k: Float[Array, "C T H"],
        length: Int[Array, ""],
        budget: Int[Array, ""],
    ) -> Float[Array, "C T"]:
        """Scores of this device's slots; keys of the window and of the padding score 0.

        `q` are the queries from `window_start` on.
        """
        window = jnp.minimum(self.window, budget)
        query_at = window_start(length, q.shape[2]) + jnp.arange(q.shape[2])
        key_at = jnp.arange(k.shape[1])
        q, k = q.astype(jnp.float32), k.astype(jnp.float32)
        logits = jnp.einsum("cgwh,cth->cgwt", q, k) * q.shape[-1] ** -0.5
        logits = jnp.where(key_at <= query_at[:, None], logits, -jnp.inf)
        probabilities = jax.nn.softmax(logits, axis=-1)
        in_window = (query_at >= length - window) & (query_at < length)
        mean = jnp.sum(jnp.where(in_window[:, None], probabilities, 0), 2) / window
        mean = jnp.where(key_at < length - window, mean, 0)
        if self.pool_first:
            return jnp.mean(_pool(mean, self.pool, self.kernel), 1)
        return _pool(jnp.mean(mean, 1), self.pool, self.kernel)


def window_start(length: Int[Array, ""], size: int) -> Int[Array, ""]:
    """Where the last `size` tokens of a prompt begin; it may have fewer."""
    return jnp.maximum(length - size, 0)


def _pool(scores: Float[Array, "*rows T"], pool: str, kernel: int) -> Float[Array, "*rows T"]:
    """Sliding maximum or mean of odd width; beyond the ends stand zeros.

    Scores are probabilities, so that a zero never wins a maximum; in the mean it counts.
    """
    side = kernel // 2
    padded = jnp.pad(scores, [(0, 0)] * (scores.ndim - 1) + [(side, side)])
    shifted = [padded[..., i : i + scores.shape[-1]] for i in range(kernel)]
    if pool == "max":
        return jnp.stack(shifted).max(0)
    return sum(shifted[1:], shifted[0]) / kernel
