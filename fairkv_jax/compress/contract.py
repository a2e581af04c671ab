"""What a compression method is: the interfaces between the prefill, scorers and allocators.

The prefill runs a prompt layer by layer, each layer in chunks of tokens. For each layer it calls

    stats  = scorer.init(shape)                                 before the layer's first chunk
    stats  = scorer.observe(stats, chunk)                       after each chunk
    scores = scorer.score(stats, k, v, length, budgets)         once the layer is done
    keep   = method.select(scores, budgets, length)             all heads together

All but `select` runs per device, over its C head slots, inside `shard_map`.
"""

from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int

Stats = Any
"""What a scorer carries through a layer's chunks: a pytree of arrays whose first axis is slots."""


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one device's part of a layer."""

    num_slots: int
    """Head slots (C)."""
    group_size: int
    """Query heads per KV head (G)."""
    head_dim: int
    """Head width (H)."""
    num_tokens: int
    """Prompt tokens (T), padding included."""
    dtype: DTypeLike
    """Type of queries, keys and values."""


@dataclass(frozen=True)
class Chunk:
    """A block of prompt tokens in one layer. A scorer pays only for the fields that it reads."""

    length: Int[Array, ""]
    """Tokens of the whole prompt."""
    first_position: Int[Array, ""]
    """Position of the prompt's first token: 0, or where the prompt is a suffix, its start."""
    positions: Int[Array, "b"]
    """Index of each token in the prompt; entries at or past `length` are padding."""
    frequencies: Float[Array, "half"]
    """Rotary angle of each pair of dimensions per position, in radians."""
    x: Float[Array, "b D"]
    """Normalised input of the attention block."""
    q_unrotated: Float[Array, "b C G H"]
    """Queries before RoPE."""
    q: Float[Array, "b C G H"]
    k: Float[Array, "b C H"]
    v: Float[Array, "b C H"]
    w_o: Float[Array, "C G H D"]
    """Output projection of each slot."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scores:
    """Importance of each token to each head; larger is more important.

    Entries at or past the prompt's length are undefined, and `Method.select` masks them.
    """

    primary: Float[Array, "heads T"]
    secondary: Float[Array, "heads T"] | None = None
    """Another number per token and head, for allocators that use one; a method that shares its
    scores over heads does not share it."""


class Scorer(Protocol):
    """Scores the tokens of one layer; hashable, since it is a static argument of the prefill."""

    @property
    def num_sinks(self) -> int:
        """First tokens of the prompt that every head keeps, as far as its budget goes."""
        ...

    @property
    def window(self) -> int:
        """Last tokens of the prompt that every head keeps, as far as its budget goes."""
        ...

    def init(self, shape: LayerShape) -> Stats:
        """Returns the statistics before a layer's first chunk."""
        ...

    def observe(self, stats: Stats, chunk: Chunk) -> Stats:
        """Adds a chunk; the statistics keep their shapes and types."""
        ...

    def score(
        self,
        stats: Stats,
        k: Float[Array, "C T H"],
        v: Float[Array, "C T H"],
        length: Int[Array, ""],
        budgets: Int[Array, "C"],
    ) -> Scores:
        """Scores all tokens of the layer; the budgets are at most `length`."""
        ...


@dataclass(frozen=True)
class RepeatedChunk:
    """A block of tokens with which the model repeats part of a prompt, in one layer.

    The repetition follows the whole prompt, and attends to all of it.
    """

    length: Int[Array, ""]
    """Tokens of the whole prompt."""
    part: tuple[Int[Array, ""], Int[Array, ""]]
    """The tokens of the prompt that are repeated: the first, and the one behind the last."""
    index: Int[Array, "b"]
    """Index of each token in the repetition."""
    num_tokens: Int[Array, ""]
    """Tokens of the repetition, the instruction included; later ones are padding."""
    x: Float[Array, "b D"]
    """Normalised input of the attention block."""
    q: Float[Array, "b C G H"]
    prompt_k: Float[Array, "C T H"]
    """Keys of the prompt."""
    k: Float[Array, "C S H"]
    """Keys of the repetition, up to the end of this block."""


class RepeatingScorer(Scorer, Protocol):
    """A scorer that also looks at how the model repeats the prompt.

    Its statistics of every layer are kept until the whole prompt has been repeated. Only then does
    it observe the prompt's own chunks, of which it may read `positions`, `k`, `v` and `w_o`.
    """

    def observe_repetition(self, stats: Stats, chunk: RepeatedChunk) -> Stats:
        """Adds a block of a repetition."""
        ...


class FromKeysAndValues:
    """What scorers have in common that need nothing but the layer's keys and values."""

    def init(self, shape: LayerShape) -> Stats:
        return ()

    def observe(self, stats: Stats, chunk: Chunk) -> Stats:
        return stats


class Allocator(Protocol):
    """Spreads a layer's budget over its heads; hashable."""

    def __call__(self, scores: Scores, budgets: Int[Array, "K"]) -> Bool[Array, "K T"]:
        """Marks the tokens that each head keeps.

        In `scores.primary`, protected tokens are +inf and padding is -inf. Budgets count the
        protected tokens, and are at most the prompt's length.
        """
        ...


@dataclass(frozen=True)
class Method:
    """A compression method; hashable, since it is a static argument of the prefill."""

    scorer: Scorer
    allocator: Allocator
    is_query_agnostic: bool
    """Whether the tokens kept of a prefix do not depend on the tokens that follow it."""
    mean_over_heads: bool = False
    """Whether all heads of a layer share the mean of their scores."""

    def select(
        self, scores: Scores, budgets: Int[Array, "K"], length: Int[Array, ""]
    ) -> Bool[Array, "K T"]:
        """Marks the tokens that each head keeps: of a layer, or of all layers one after another.

        All tokens are kept where every budget covers the prompt.
        """
        num_tokens = scores.primary.shape[1]
        is_prompt = jnp.arange(num_tokens) < length
        budgets = jnp.minimum(budgets, length)
        if self.mean_over_heads:
            mean = jnp.mean(scores.primary, 0, keepdims=True)
            scores = replace(scores, primary=jnp.broadcast_to(mean, scores.primary.shape))
        primary = jnp.where(self._protected(budgets, length, num_tokens), jnp.inf, scores.primary)
        primary = jnp.where(is_prompt, primary, -jnp.inf)
        keep = self.allocator(replace(scores, primary=primary), budgets)
        return is_prompt & (keep | jnp.all(budgets >= length))

    def _protected(
        self, budgets: Int[Array, "K"], length: Int[Array, ""], num_tokens: int
    ) -> Bool[Array, "K T"]:
        """Marks sinks and window of each head, shrunk to its own budget: the window goes first."""
        position = jnp.arange(num_tokens)
        sinks = jnp.minimum(self.scorer.num_sinks, budgets)[:, None]
        window = jnp.minimum(self.scorer.window, budgets[:, None] - sinks)
        return (position < sinks) | (position >= length - window)


def scorer_index(methods: tuple[Method, ...], method: Int[Array, ""]) -> Int[Array, ""]:
    """Returns the index in `distinct_scorers(methods)` of the scorer of `methods[method]`."""
    scorers = distinct_scorers(methods)
    return jnp.array([scorers.index(each.scorer) for each in methods])[method]


def distinct_scorers(methods: tuple[Method, ...]) -> tuple[Scorer, ...]:
    """Returns the scorers of these methods, each once."""
    return tuple(dict.fromkeys(method.scorer for method in methods))
