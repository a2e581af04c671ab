"""CriticalKV (Feng et al., 2025): a second ranking, by what a token's value adds to the output."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fairkv_jax.compress.contract import Chunk, LayerShape, Scorer, Scores, Stats

_EPSILON = 1e-4
"""Added to the scores, so that a value counts also where its token got no attention."""


@dataclass(frozen=True)
class WithContributions:
    """Adds the second ranking to another scorer, for the allocator `CriticalAda`.

    It is (score + 1e-4) * |W_o v|_1, with the mean of the norm over the group's query heads.
    """

    scorer: Scorer

    @property
    def num_sinks(self) -> int:
        return self.scorer.num_sinks

    @property
    def window(self) -> int:
        return self.scorer.window

    def init(self, shape: LayerShape) -> Stats:
        return self.scorer.init(shape), jnp.zeros((shape.num_slots, shape.num_tokens))

    def observe(self, stats: Stats, chunk: Chunk) -> Stats:
        inner, norms = stats
        outputs = jnp.einsum("bch,cghd->bcgd", chunk.v, chunk.w_o)
        of_chunk = jnp.mean(jnp.sum(jnp.abs(outputs.astype(jnp.float32)), -1), -1)
        norms = norms.at[:, chunk.positions].set(of_chunk.T, mode="drop")
        return self.scorer.observe(inner, chunk), norms

    def score(
        self,
        stats: Stats,
        k: Float[Array, "C T H"],
        v: Float[Array, "C T H"],
        length: Int[Array, ""],
        budgets: Int[Array, "C"],
    ) -> Scores:
        inner, norms = stats
        primary = self.scorer.score(inner, k, v, length, budgets).primary
        return Scores(primary, (primary + _EPSILON) * norms)
