"""Expected Attention (Devoto et al., 2025): the attention that later queries are expected to pay.

Queries of the prompt, before RoPE, are taken as samples of a normal distribution from which later
queries are drawn. For a query N(mu, Sigma), the expected unnormalised attention to a key k is
exp(mu k / sqrt(H) + k' Sigma k / 2H), the moment-generating function of their product.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fairkv_jax.compress.contract import Chunk, LayerShape, Scores

_NUM_FUTURE = 512
"""Positions after the prompt over which the rotation of later queries is averaged."""


class QueryMoments(NamedTuple):
    """Moments of the queries seen so far, in float32, and the mean rotation of later ones."""

    count: Float[Array, "C"]
    mean: Float[Array, "C G H"]
    deviations: Float[Array, "C G H H"]
    """Sums of the outer products of the deviations from the mean."""
    cos: Float[Array, "C half"]
    sin: Float[Array, "C half"]


@dataclass(frozen=True)
class ExpectedAttention:
    """Scores a key by (expected attention + epsilon) * |value|.

    The expected attention is a softmax over the keys after the sinks, averaged over the group's
    query heads. The queries of the sinks are left out of the moments.
    """

    epsilon: float = 1e-2
    num_sinks: int = 4
    window: int = 0

    def init(self, shape: LayerShape) -> QueryMoments:
        slots, group, width = shape.num_slots, shape.group_size, shape.head_dim
        half = jnp.zeros((slots, width // 2))
        return QueryMoments(
            jnp.zeros(slots),
            jnp.zeros((slots, group, width)),
            jnp.zeros((slots, group, width, width)),
            half,
            half,
        )

    def observe(self, stats: QueryMoments, chunk: Chunk) -> QueryMoments:
        """Merges the chunk's moments into those before (Chan et al., 1983)."""
        counted = (chunk.positions >= self.num_sinks) & (chunk.positions < chunk.length)
        weights = counted.astype(jnp.float32)
        new = jnp.sum(weights)
        queries = chunk.q_unrotated.astype(jnp.float32)
        of_chunk = jnp.einsum("bcgh,b->cgh", queries, weights) / jnp.maximum(new, 1)
        deviations = (queries - of_chunk) * weights[:, None, None, None]
        total = jnp.maximum(stats.count + new, 1)
        shift = of_chunk - stats.mean
        between = (stats.count * new / total)[:, None, None, None]
        cos, sin = _mean_rotation(chunk)
        return QueryMoments(
            stats.count + new,
            stats.mean + shift * (new / total)[:, None, None],
            stats.deviations
            + jnp.einsum("bcgh,bcgi->cghi", deviations, deviations)
            + between * shift[..., :, None] * shift[..., None, :],
            jnp.broadcast_to(cos, stats.cos.shape),
            jnp.broadcast_to(sin, stats.sin.shape),
        )

    def score(
        self,
        stats: QueryMoments,
        k: Float[Array, "C T H"],
        v: Float[Array, "C T H"],
        length: Int[Array, ""],
        budgets: Int[Array, "C"],
    ) -> Scores:
        width = k.shape[-1]
        keys, values = k.astype(jnp.float32), v.astype(jnp.float32)
        mean = _turn(stats.mean, stats)
        covariance = stats.deviations / jnp.maximum(stats.count, 1)[:, None, None, None]
        covariance = _turn(jnp.swapaxes(_turn(covariance, stats), -1, -2), stats)
        position = jnp.arange(k.shape[1])
        counted = (position >= self.num_sinks) & (position < length)

        def of_query_head(moments: tuple[Array, Array]) -> Float[Array, "C T"]:
            mean, covariance = moments
            logits = jnp.einsum("ch,cth->ct", mean, keys) * width**-0.5
            logits += jnp.sum(jnp.einsum("cth,chi->cti", keys, covariance) * keys, -1) / (2 * width)
            probabilities = jax.nn.softmax(jnp.where(counted, logits, -jnp.inf), -1)
            return jnp.where(counted, probabilities, 0)  # not NaN where no key is counted

        # One query head after the other: this needs the memory of one copy of the keys.
        heads = jnp.swapaxes(mean, 0, 1), jnp.swapaxes(covariance, 0, 1)
        attention = jnp.mean(jax.lax.map(of_query_head, heads), 0)
        return Scores((attention + self.epsilon) * jnp.sqrt(jnp.sum(values * values, -1)))


def _mean_rotation(chunk: Chunk) -> tuple[Float[Array, "half"], Float[Array, "half"]]:
    """Returns the mean cosine and sine of the rotations of the positions after the prompt."""
    positions = chunk.first_position + chunk.length + jnp.arange(_NUM_FUTURE)
    angles = positions[:, None].astype(jnp.float32) * chunk.frequencies
    return jnp.mean(jnp.cos(angles), 0), jnp.mean(jnp.sin(angles), 0)


def _turn(x: Float[Array, "C G *rows H"], stats: QueryMoments) -> Float[Array, "C G *rows H"]:
    """Applies the mean rotation to the last axis, whose pairs are (i, i + H/2)."""
    shape = (len(x), *(1,) * (x.ndim - 2), -1)
    cos, sin = stats.cos.reshape(shape), stats.sin.reshape(shape)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
