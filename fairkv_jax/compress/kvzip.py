"""KVzip (Kim et al., 2025): what the model attends to when it repeats the prompt is important."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fairkv_jax.compress.contract import Chunk, LayerShape, RepeatedChunk, Scores
from fairkv_jax.compress.value_norms import output_norms

Attended = tuple[Float[Array, "C G T"], Float[Array, "C G T"] | None]
"""Per token of the prompt, the most attention that a query paid to it, and the weight of its value;
None where values are not weighed."""


@dataclass(frozen=True)
class Repetition:
    """Scores a token by the most attention that a repetition of its part of the prompt pays to it.

    The maximum is over the queries and the query heads of the group. The attention probabilities
    are over the sinks, the repeated part, and the repetition up to the query.

    With `weighs_values` (KVzip+ in NVIDIA/kvpress), the attention is divided by |x|, the norm of
    the query's input, and multiplied by |W_o v|, the norm of what the value adds to the output.
    """

    weighs_values: bool
    num_sinks: int = 4
    window: int = 0

    def init(self, shape: LayerShape) -> Attended:
        zeros = jnp.zeros((shape.num_slots, shape.group_size, shape.num_tokens))
        return zeros, zeros if self.weighs_values else None

    def observe(self, stats: Attended, chunk: Chunk) -> Attended:
        attention, norms = stats
        if norms is None:
            return stats
        of_chunk = output_norms(chunk, order=2)
        return attention, norms.at[:, :, chunk.positions].set(of_chunk, mode="drop")

    def observe_repetition(self, stats: Attended, chunk: RepeatedChunk) -> Attended:
        attention, norms = stats
        start, stop = chunk.part
        num_tokens, num_repeated = chunk.prompt_k.shape[1], chunk.k.shape[1]
        # A part is never longer than its repetition; the last one may begin before its `start`.
        size = min(num_repeated, num_tokens)
        first = jnp.minimum(start, num_tokens - size)
        sinks = chunk.prompt_k[:, : self.num_sinks]
        part = jax.lax.dynamic_slice_in_dim(chunk.prompt_k, first, size, 1)
        keys = jnp.concatenate([sinks, part, chunk.k], 1).astype(jnp.float32)
        sink_at, part_at = jnp.arange(sinks.shape[1]), first + jnp.arange(size)
        in_part = (part_at >= start) & (part_at < stop)
        of_prompt = jnp.concatenate([sink_at < start, in_part])
        causal = jnp.arange(num_repeated) <= chunk.index[:, None]
        rows = (len(chunk.index), len(of_prompt))
        is_seen = jnp.concatenate([jnp.broadcast_to(of_prompt, rows), causal], 1)
        queries = chunk.q.astype(jnp.float32)
        x = chunk.x.astype(jnp.float32)
        weights = 1 / jnp.sqrt(jnp.sum(x * x, -1)) if self.weighs_values else jnp.ones(len(x))
        weights = jnp.where(chunk.index < chunk.num_tokens, weights, 0)

        def of_query_head(q: Float[Array, "b C H"]) -> Float[Array, "C n"]:
            logits = jnp.einsum("bch,csh->cbs", q, keys) * q.shape[-1] ** -0.5
            probabilities = jax.nn.softmax(jnp.where(is_seen, logits, -jnp.inf), -1)
            to_part = probabilities[..., len(sink_at) : len(of_prompt)]
            return jnp.max(to_part * weights[:, None], 1)

        new = jnp.swapaxes(jax.lax.map(of_query_head, jnp.moveaxis(queries, 2, 0)), 0, 1)
        old = jax.lax.dynamic_slice_in_dim(attention, first, size, 2)
        new = jnp.where(in_part, jnp.maximum(old, new), old)
        return jax.lax.dynamic_update_slice_in_dim(attention, new, first, 2), norms

    def score(
        self,
        stats: Attended,
        k: Float[Array, "C T H"],
        v: Float[Array, "C T H"],
        length: Int[Array, ""],
        budgets: Int[Array, "C"],
    ) -> Scores:
        attention, norms = stats
        return Scores(jnp.max(attention if norms is None else attention * norms, 1))
