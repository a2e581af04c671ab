"""CriticalKV (Feng et al., 2025): scores with what each token's value adds to the output."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fairkv_jax.compress.contract import (
    Chunk,
    LayerShape,
    RepeatedChunk,
    Scorer,
    Scores,
    Stats,
)
from fairkv_jax.compress.value_norms import output_norms


@dataclass(frozen=True)
class WithContributions:
    """Adds the contributions of values to another scorer, for the allocator `CriticalAda`.

    They are |W_o v|_1, averaged over the group's query heads.
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
        of_chunk = jnp.mean(output_norms(chunk, order=1), 1)
        norms = norms.at[:, chunk.positions].set(of_chunk, mode="drop")
        return self.scorer.observe(inner, chunk), norms

    def observe_repetition(self, stats: Stats, chunk: RepeatedChunk) -> Stats:
        """Hands the block on, where the other scorer is a `RepeatingScorer`."""
        inner, norms = stats
        scorer: Any = self.scorer
        return scorer.observe_repetition(inner, chunk), norms

    def score(
        self,
        stats: Stats,
        k: Float[Array, "C T H"],
        v: Float[Array, "C T H"],
        length: Int[Array, ""],
        budgets: Int[Array, "C"],
    ) -> Scores:
        inner, norms = stats
        return Scores(self.scorer.score(inner, k, v, length, budgets).primary, norms)
