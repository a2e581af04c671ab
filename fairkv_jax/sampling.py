"""Samples tokens on the devices; every row of the batch has its own options."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from fairkv_jax.sampling_params import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_STOP_TOKEN_IDS,
    NO_TOKEN,
    SamplingParams,
)
from fairkv_jax.select import keep_mass

_HOT = 1e30
"""A temperature at which all tokens are equally likely, and a factor that float32 still holds."""
_HISTORY_BLOCK = 1024
"""Tokens of each row that the penalties count at a time."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingState:
    """The sampling options of every row as arrays."""

    key: UInt32[Array, "B 2"]
    """The row's seed; a token's random key combines it with the token's index in the output."""
    temperature: Float[Array, "B"]
    top_k: Int[Array, "B"]
    """The vocabulary size where all tokens are kept."""
    top_p: Float[Array, "B"]
    min_p: Float[Array, "B"]
    presence: Float[Array, "B"]
    frequency: Float[Array, "B"]
    repetition: Float[Array, "B"]
    bias_tokens: Int[Array, "B MAX_LOGIT_BIAS"]
    """Unused entries hold the vocabulary size."""
    bias: Float[Array, "B MAX_LOGIT_BIAS"]
    min_tokens: Int[Array, "B"]
    end_tokens: Int[Array, "B MAX_STOP_TOKEN_IDS"]
    """Tokens that would end the output; unused entries hold the vocabulary size."""
    follows_grammar: Bool[Array, "B"]
    """Whether the row may draw only tokens of its grammar bitmask."""
    wants_logprobs: Bool[Array, "B"]

    @classmethod
    def stack(
        cls,
        rows: Sequence[tuple[SamplingParams, int]],
        vocab_size: int,
        eos_token_ids: Iterable[int] = (),
    ) -> "SamplingState":
        """Builds the options of one (parameters, seed) pair per row."""

        params = [params for params, _ in rows]
        seeds = [divmod(seed % 2**64, 2**32) for _, seed in rows]
        top_k = [min(p.top_k, vocab_size) if p.top_k > 0 else vocab_size for p in params]
        bias_tokens = np.full((len(rows), MAX_LOGIT_BIAS), vocab_size, np.int32)
        bias = np.zeros((len(rows), MAX_LOGIT_BIAS), np.float32)
        end_tokens = np.full((len(rows), MAX_STOP_TOKEN_IDS), vocab_size, np.int32)
        for row, each in enumerate(params):
            if each.logit_bias:
                biased = dict(each.logit_bias)
                bias_tokens[row, : len(biased)] = list(biased)
                bias[row, : len(biased)] = list(biased.values())
            if each.min_tokens:
                ends = sorted({*eos_token_ids, *(each.stop_token_ids or ())})
                end_tokens[row, : len(ends)] = ends
        repetition = [min(max(p.repetition_penalty, 1 / _HOT), _HOT) for p in params]
        # NumPy arrays: making them on a device would compile something for every batch size.
        array: Any = np.asarray
        return cls(
            array(seeds, np.uint32),
            array([min(p.temperature, _HOT) for p in params], np.float32),
            array(top_k, np.int32),
            array([p.top_p for p in params], np.float32),
            array([p.min_p for p in params], np.float32),
            array([p.presence_penalty for p in params], np.float32),
            array([p.frequency_penalty for p in params], np.float32),
            array(repetition, np.float32),
            array(bias_tokens),
            array(bias),
            array([p.min_tokens for p in params], np.int32),
            array(end_tokens),
            array([p.structured_outputs is not None for p in params], np.bool_),
            array([p.logprobs is not None for p in params], np.bool_),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampled:
    """The chosen tokens; the log-probabilities are zeros unless a row asks for them."""

    tokens: Int[Array, "B"]
    logprob: Float[Array, "B"]
    rank: Int[Array, "B"]
    top_tokens: Int[Array, "B n"]
    top_logprobs: Float[Array, "B n"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenHistory:
    """The tokens of every row so far: its prompt and its output."""

    tokens: Int[Array, "rows S"]
    """In their order. Entries at or past `length`, and rows >= B, are undefined."""
    length: Int[Array, "B"]


def sample(
    logits: Float[Array, "B V"],
    state: SamplingState,
    output_index: Int[Array, "B"],
    history: TokenHistory,
    grammar_bitmask: UInt32[Array, "B W"],
) -> Sampled:
    """Chooses a token per row: greedy where the temperature is 0, else by the Gumbel-max rule.

    `output_index` is the number of tokens that the row has generated, the last ones of its history.
    A row's token depends on its logits, its options, its seed and its history, and not on the row's
    number. Where the largest logit is not finite, the token is `NO_TOKEN`.

    `grammar_bitmask` has a bit per token, the lowest first, 32 per word (W is V / 32, rounded up);
    it is read only for rows that follow a grammar.
    """
    adjusted = _adjust(logits, state, output_index, history, grammar_bitmask)
    greedy = jnp.argmax(adjusted, -1)
    tokens = jax.lax.cond(
        jnp.any(state.temperature > 0),
        lambda: jnp.where(state.temperature > 0, _draw(adjusted, state, output_index), greedy),
        lambda: greedy,
    )
    logprobs = jax.lax.cond(
        jnp.any(state.wants_logprobs),
        lambda: ranked_logprobs(logits, tokens),
        lambda: jax.tree.map(
            lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(ranked_logprobs, logits, tokens)
        ),
    )
    is_finite = jnp.isfinite(logits.max(-1))  # The maximum of NaN and any number is NaN.
    return Sampled(jnp.where(is_finite, tokens, NO_TOKEN), *logprobs)


@jax.jit
def sample_first(
    logits: Float[Array, "V"],
    state: SamplingState,
    history: TokenHistory,
    grammar_bitmask: UInt32[Array, "1 W"],
) -> Sampled:
    """The first token of a row, from the logits of its prefill."""
    return sample(logits[None], state, jnp.zeros(1, jnp.int32), history, grammar_bitmask)


def _adjust(
    logits: Array,
    state: SamplingState,
    output_index: Array,
    history: TokenHistory,
    grammar_bitmask: Array,
) -> Float[Array, "B V"]:
    """Applies each row's options to its logits; a step that no row needs costs nothing."""
    is_early = output_index < state.min_tokens
    is_penalised = (state.presence != 0) | (state.frequency != 0) | (state.repetition != 1)
    steps = (
        (
            state.follows_grammar,
            lambda logits: _apply_grammar(logits, state.follows_grammar, grammar_bitmask),
        ),
        (state.bias.any(-1), lambda logits: _add_bias(logits, state)),
        (is_early, lambda logits: _postpone_end(logits, is_early, state.end_tokens)),
        (
            is_penalised,
            lambda logits: _penalise(logits, state, output_index, history, is_penalised),
        ),
    )
    for wanted, step in steps:
        logits = jax.lax.cond(jnp.any(wanted), step, lambda logits: logits, logits)
    return logits


def _apply_grammar(
    logits: Array, follows_grammar: Array, grammar_bitmask: UInt32[Array, "B W"]
) -> Array:
    """Leaves rows that follow a grammar the tokens whose bit is set."""
    bits = grammar_bitmask[..., None] >> jnp.arange(32, dtype=jnp.uint32) & 1
    is_allowed = bits.reshape(len(logits), -1)[:, : logits.shape[-1]] > 0
    return jnp.where(follows_grammar[:, None] & ~is_allowed, -jnp.inf, logits)


def _add_bias(logits: Array, state: SamplingState) -> Array:
    rows = jnp.arange(len(logits))[:, None]
    return logits.at[rows, state.bias_tokens].add(state.bias, mode="drop")


def _postpone_end(logits: Array, is_early: Array, end_tokens: Array) -> Array:
    """Bans tokens that would end the output too early, unless no other token is left."""
    rows = jnp.arange(len(logits))[:, None]
    banned = logits.at[rows, end_tokens].set(-jnp.inf, mode="drop")
    is_left = jnp.any(banned > -jnp.inf, -1)
    return jnp.where((is_early & is_left)[:, None], banned, logits)


def _penalise(
    logits: Array,
    state: SamplingState,
    output_index: Array,
    history: TokenHistory,
    is_penalised: Array,
) -> Array:
    """Repetition, frequency and presence penalties, as in vLLM.

    They are those of CTRL (arXiv:1909.05858, section 4.1), over prompt and output, and OpenAI's,
    over the output alone.
    """
    length = jnp.where(is_penalised, history.length, 0)
    in_prompt, in_output = _count(history.tokens, length, length - output_index, logits.shape[-1])
    factor = jnp.where((in_prompt + in_output) > 0, state.repetition[:, None], 1)
    logits = jnp.where(logits > 0, logits / factor, logits * factor)
    logits -= state.frequency[:, None] * in_output
    return logits - state.presence[:, None] * (in_output > 0)


def _count(
    tokens: Int[Array, "rows S"], length: Int[Array, "B"], prompt_length: Array, vocab_size: int
) -> tuple[Int[Array, "B V"], Int[Array, "B V"]]:
    """How often each token stands in a row's prompt, and in its output.

    Block by block, as far as the longest of the rows reaches.
    """
    batch, capacity = len(length), tokens.shape[1]
    block = min(_HISTORY_BLOCK, capacity)
    rows = jnp.arange(batch)[:, None]

    def add(i: Array, counts: tuple[Array, Array]) -> tuple[Array, Array]:
        # The last block may reach back into the one before it, whose tokens have been counted.
        start = jnp.minimum(i * block, capacity - block)
        at = start + jnp.arange(block)
        is_new = (at >= i * block) & (at < length[:, None])
        is_output = at >= prompt_length[:, None]
        part = jax.lax.dynamic_slice(tokens, (0, start), (batch, block))
        in_prompt, in_output = counts
        return (
            in_prompt.at[rows, part].add((is_new & ~is_output).astype(jnp.int32), mode="drop"),
            in_output.at[rows, part].add((is_new & is_output).astype(jnp.int32), mode="drop"),
        )

    zeros = jnp.zeros((batch, vocab_size), jnp.int32)
    num_blocks = -(-jnp.max(length) // block)
    return jax.lax.fori_loop(0, num_blocks, add, (zeros, zeros))


def _draw(logits: Array, state: SamplingState, output_index: Array) -> Int[Array, "B"]:
    """Samples from the softmax of the scaled and truncated logits."""
    # Below 0 before the division, so that no temperature makes an infinity of the maximum.
    scaled = logits - logits.max(-1, keepdims=True)
    scaled /= jnp.where(state.temperature > 0, state.temperature, 1)[:, None]
    needs_cut = (state.top_k < logits.shape[-1]) | (state.top_p < 1) | (state.min_p > 0)
    scaled = jax.lax.cond(jnp.any(needs_cut), lambda: _truncate(scaled, state), lambda: scaled)

    def noise(key: Array, output_index: Array) -> Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), output_index)
        return jax.random.gumbel(key, logits.shape[-1:])

    return jnp.argmax(scaled + jax.vmap(noise)(state.key, output_index), -1)


def _truncate(scaled: Float[Array, "B V"], state: SamplingState) -> Float[Array, "B V"]:
    """Min-p, then top-k, then top-p: what falls out gets -inf. The maximum of a row is 0."""
    scaled = jnp.where(scaled < jnp.log(state.min_p)[:, None], -jnp.inf, scaled)
    best = keep_mass(scaled, jnp.ones_like(scaled, jnp.int32), state.top_k)
    scaled = jnp.where(best, scaled, -jnp.inf)
    weights = jnp.exp(scaled)
    nucleus = keep_mass(scaled, weights, state.top_p * weights.sum(-1))
    nucleus |= (scaled >= 0) | (state.top_p >= 1)[:, None]
    return jnp.where(nucleus, scaled, -jnp.inf)


def ranked_logprobs(
    logits: Float[Array, "B V"], tokens: Int[Array, "B"]
) -> tuple[Float[Array, "B"], Int[Array, "B"], Int[Array, "B n"], Float[Array, "B n"]]:
    """The chosen tokens' log-probabilities and ranks, and the likeliest tokens with theirs."""
    logprobs = jax.nn.log_softmax(logits, -1)
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], -1)
    rank = jnp.sum(logprobs > chosen, -1) + 1
    top_logprobs, top_tokens = jax.lax.top_k(logprobs, min(MAX_LOGPROBS, logits.shape[-1]))
    return chosen[:, 0], rank, top_tokens, top_logprobs
