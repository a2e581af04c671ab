"""SnapKV (Li et al., 2024): the attention that the prompt's last queries pay to each key."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fairkv_jax.compress.contract import Chunk, LayerShape, Scores
from fairkv_jax.config import KVConfig

WindowQueries = Float[Array, "C G w H"]
"""Queries of the prompt's last w tokens, from `_window_start` on."""


@dataclass(frozen=True)
class WindowAttention:
    """Scores a key by the mean attention of the last queries, pooled along the keys.

    The attention probabilities are over all keys up to the query, in float32. They are averaged
    over the window's queries and over the group's query heads. The window's own keys are left out
    of the pooling. A head whose budget is smaller than the window has a window of its budget.
    """

    window: int
    pool: str
    kernel: int
    pool_first: bool
    """Whether each query head is pooled before the mean over the group, instead of after."""
    num_sinks: int = 0

    @classmethod
    def from_config(cls, config: KVConfig) -> "WindowAttention":
        return cls(config.window, config.pooling, config.kernel, config.pool_first)

    def init(self, shape: LayerShape) -> WindowQueries:
        size = min(self.window, shape.num_tokens)
        return jnp.zeros((shape.num_slots, shape.group_size, size, shape.head_dim), shape.dtype)

    def observe(self, stats: WindowQueries, chunk: Chunk) -> WindowQueries:
        """Takes those of the chunk's queries that are among the prompt's last."""
        size = stats.shape[2]
        index = chunk.positions - _window_start(chunk.length, size)
        index = jnp.where(index < 0, size, index)  # out of bounds: dropped
        return stats.at[:, :, index].set(chunk.q.transpose(1, 2, 0, 3), mode="drop")

    def score(
        self,
        stats: WindowQueries,
        k: Float[Array, "C T H"],
        v: Float[Array, "C T H"],
        length: Int[Array, ""],
        budgets: Int[Array, "C"],
    ) -> Scores:
        """Scores the keys; those of a head's window get 0."""
        window = jnp.minimum(self.window, budgets)[:, None]
        query_at = _window_start(length, stats.shape[2]) + jnp.arange(stats.shape[2])
        key_at = jnp.arange(k.shape[1])
        q, k = stats.astype(jnp.float32), k.astype(jnp.float32)
        logits = jnp.einsum("cgwh,cth->cgwt", q, k) * q.shape[-1] ** -0.5
        logits = jnp.where(key_at <= query_at[:, None], logits, -jnp.inf)
        probabilities = jax.nn.softmax(logits, axis=-1)
        in_window = (query_at >= length - window) & (query_at < length)
        counted = jnp.where(in_window[:, None, :, None], probabilities, 0)
        mean = jnp.sum(counted, 2) / window[:, None]
        mean = jnp.where((key_at < length - window)[:, None], mean, 0)
        if self.pool_first:
            return Scores(jnp.mean(_pool(mean, self.pool, self.kernel), 1))
        return Scores(_pool(jnp.mean(mean, 1), self.pool, self.kernel))


def _window_start(length: Int[Array, ""], size: int) -> Int[Array, ""]:
    """Returns the position of the first of the last `size` tokens, or 0 in shorter prompts."""
    return jnp.maximum(length - size, 0)


def _pool(scores: Float[Array, "*rows T"], pool: str, kernel: int) -> Float[Array, "*rows T"]:
    """Returns the sliding maximum or mean of odd width, with zeros beyond both ends.

    Scores are probabilities, so a zero never wins a maximum; in the mean it counts.
    """
    side = kernel // 2
    padded = jnp.pad(scores, [(0, 0)] * (scores.ndim - 1) + [(side, side)])
    shifted = [padded[..., i : i + scores.shape[-1]] for i in range(kernel)]
    if pool == "max":
        return jnp.stack(shifted).max(0)
    return sum(shifted[1:], shifted[0]) / kernel
