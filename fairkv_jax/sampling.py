"""Sampling on the devices: every row of the batch with options of its own."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from fairkv_jax.sampling_params import MAX_LOGPROBS, SamplingParams
from fairkv_jax.select import keep_mass

_HOT = 1e30
"""A temperature at which all tokens are alike, and which float32 still holds."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingState:
    """The options of every row as arrays."""

    key: UInt32[Array, "B 2"]
    """The row's seed; the key of a token is made of it and the token's place in the output."""
    temperature: Float[Array, "B"]
    top_k: Int[Array, "B"]
    """The vocabulary's size where all tokens are kept."""
    top_p: Float[Array, "B"]
    min_p: Float[Array, "B"]
    wants_logprobs: Bool[Array, "B"]

    @classmethod
    def stack(cls, rows: Sequence[tuple[SamplingParams, int]], vocab_size: int) -> "SamplingState":
        """The options of (parameters, seed) pairs, one a row."""

        params = [params for params, _ in rows]
        seeds = [divmod(seed % 2**64, 2**32) for _, seed in rows]
        top_k = [min(p.top_k, vocab_size) if p.top_k > 0 else vocab_size for p in params]
        return cls(
            jnp.asarray(seeds, jnp.uint32),
            jnp.asarray([min(p.temperature, _HOT) for p in params], jnp.float32),
            jnp.asarray(top_k, jnp.int32),
            jnp.asarray([p.top_p for p in params], jnp.float32),
            jnp.asarray([p.min_p for p in params], jnp.float32),
            jnp.asarray([p.logprobs is not None for p in params], jnp.bool_),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampled:
    """The chosen tokens; the log-probabilities are zeros unless a row of the batch wants them."""

    tokens: Int[Array, "B"]
    logprob: Float[Array, "B"]
    rank: Int[Array, "B"]
    top_tokens: Int[Array, "B n"]
    top_logprobs: Float[Array, "B n"]


def sample(logits: Float[Array, "B V"], state: SamplingState, place: Int[Array, "B"]) -> Sampled:
    """Chooses a token per row: greedy where the temperature is 0, else by the Gumbel-max rule.

    `place` counts the tokens that the row has generated: a row's text depends on its logits, its
    options and its seed alone, not on its place in the batch.
    """
    greedy = jnp.argmax(logits, -1)
    tokens = jax.lax.cond(
        jnp.any(state.temperature > 0),
        lambda: jnp.where(state.temperature > 0, _draw(logits, state, place), greedy),
        lambda: greedy,
    )
    logprobs = jax.lax.cond(
        jnp.any(state.wants_logprobs),
        lambda: _logprobs(logits, tokens),
        lambda: jax.tree.map(
            lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(_logprobs, logits, tokens)
        ),
    )
    return Sampled(tokens, *logprobs)


@jax.jit
def sample_first(logits: Float[Array, "V"], state: SamplingState) -> Sampled:
    """The first token of a row, from the logits of its prefill."""
    return sample(logits[None], state, jnp.zeros(1, jnp.int32))


def _draw(logits: Array, state: SamplingState, place: Array) -> Int[Array, "B"]:
    """Samples from the softmax of the scaled and truncated logits."""
    # Below 0 before the division, so that no temperature makes an infinity of the maximum.
    scaled = logits - logits.max(-1, keepdims=True)
    scaled /= jnp.where(state.temperature > 0, state.temperature, 1)[:, None]
    needs_cut = (state.top_k < logits.shape[-1]) | (state.top_p < 1) | (state.min_p > 0)
    scaled = jax.lax.cond(jnp.any(needs_cut), lambda: _truncate(scaled, state), lambda: scaled)

    def noise(key: Array, place: Array) -> Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), place)
        return jax.random.gumbel(key, logits.shape[-1:])

    return jnp.argmax(scaled + jax.vmap(noise)(state.key, place), -1)


def _truncate(scaled: Float[Array, "B V"], state: SamplingState) -> Float[Array, "B V"]:
    """Min-p, then top-k, then top-p: what falls out gets -inf. The maximum of a row is 0."""
    scaled = jnp.where(scaled < jnp.log(state.min_p)[:, None], -jnp.inf, scaled)
    best = keep_mass(scaled, jnp.ones_like(scaled, jnp.int32), state.top_k)
    scaled = jnp.where(best, scaled, -jnp.inf)
    weights = jnp.exp(scaled)
    nucleus = keep_mass(scaled, weights, state.top_p * weights.sum(-1))
    nucleus |= (scaled >= 0) | (state.top_p >= 1)[:, None]
    return jnp.where(nucleus, scaled, -jnp.inf)


def _logprobs(logits: Array, tokens: Array) -> tuple[Array, Array, Array, Array]:
    """The chosen tokens' log-probabilities and ranks, and the likeliest tokens with theirs."""
    logprobs = jax.nn.log_softmax(logits, -1)
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], -1)
    rank = jnp.sum(logprobs > chosen, -1) + 1
    top_logprobs, top_tokens = jax.lax.top_k(logprobs, min(MAX_LOGPROBS, logits.shape[-1]))
    return chosen[:, 0], rank, top_tokens, top_logprobs
