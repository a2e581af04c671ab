"""Turns passages into arrays: tokens, and where the answers are.

    context   [ words ... the fact and its answer ... words | padding ]           T
    tails     [ question, the fact's beginning, answer | padding ]             Q x S

A context's tails are independent of each other: each continues the context.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from tqdm import tqdm

from fairkv_jax.attention import KEY_BLOCK
from fairkv_jax.profile.facts import Fact, Passage, draw_facts, plant, read_words
from fairkv_jax.profile.learn_config import LearnConfig
from fairkv_jax.shapes import round_up
from fairkv_jax.tokenizer import Tokenizer

_MIN_WORDS = 8
"""Words in which facts are planted at least."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Example:
    """A context and the questions about its facts. All examples of a run have the same shapes.

    `predicts`, `targets` and `weights` list the tokens of all answers, padded with zeros.
    """

    context: Int[Array, "T"]
    """Tokens; those past the length are padding."""
    length: Int[Array, ""]
    """The number of tokens of the context."""
    tails: Int[Array, "Q S"]
    """Tokens; what follows an answer is padding."""
    is_fact: Bool[Array, "Q T"]
    """Which tokens of the context are the answer in the fact."""
    predicts: Int[Array, "R"]
    """Positions in the Q * S tokens of the tails whose next token belongs to an answer."""
    targets: Int[Array, "R"]
    """The token after each of `predicts`."""
    weights: Float[Array, "R"]
    """0 for padding, otherwise one over the number of answer tokens."""


def make_examples(
    tokenizer: Tokenizer,
    config: LearnConfig,
    *,
    model: str,
    max_position_embeddings: int,
    progress: bool = True,
) -> list[Example]:
    """Draws contexts with facts, reproducibly by the seed.

    Args:
        model: the model's name, for messages.

    Raises:
        ValueError: the contexts are longer than the model's, too short for the facts, or the
            tokenizer cannot represent an answer.
    """
    rng = random.Random(config.seed)
    words = read_words(config.haystack)
    encoded = []
    for _ in tqdm(range(config.num_contexts), "texts", disable=not progress):
        passage = _draw_passage(rng, words, tokenizer, config, model)
        context = _encode_context(tokenizer, passage, model)
        encoded.append((context, [_encode_tail(tokenizer, fact, model) for fact in passage.facts]))
    tails = [tail for _, of_context in encoded for tail in of_context]
    tail_size = round_up(max(len(tail.ids) for tail in tails), 8)
    answer_size = max(len(tail.at) for tail in tails)
    longest = config.context_tokens + tail_size
    if longest > max_position_embeddings:
        raise ValueError(
            f"contexts of {config.context_tokens} tokens with questions of {tail_size} are longer "
            f"than the context of {model}, {max_position_embeddings} tokens: lower --context-tokens"
        )
    context_size = config.context_tokens
    if context_size > KEY_BLOCK:
        context_size = round_up(context_size, KEY_BLOCK)
    sizes = context_size, tail_size, answer_size
    return [_example(context, tails, sizes) for context, tails in encoded]


@dataclass(frozen=True)
class _Encoded:
    """Tokens of a text, and the indices of those that belong to an answer."""

    ids: list[int]
    at: list[int]


def _draw_passage(
    rng: random.Random,
    words: Sequence[str],
    tokenizer: Tokenizer,
    config: LearnConfig,
    model: str,
) -> Passage:
    """Draws facts, and plants them in as many words as `context_tokens` allow.

    No fact is among the first and the most recent tokens that a closed gate lets through.
    """
    facts = draw_facts(rng)
    first = 1.5 * config.sinks / config.context_tokens
    last = 1 - 1.5 * config.recent / config.context_tokens
    places = [rng.uniform(first, last) for _ in facts]
    start = rng.randrange(len(words))
    most = config.context_tokens  # a word takes at least one token
    repeats = 2 + most // len(words)
    text = (list(words) * repeats)[start : start + most]

    def planted(num_words: int) -> Passage:
        return plant(text[:num_words], facts, places)

    def num_tokens(num_words: int) -> int:
        return len(tokenizer.encode(planted(num_words).text))

    needed = num_tokens(_MIN_WORDS)
    if needed > config.context_tokens:
        raise ValueError(
            f"the facts of a context take {needed} tokens with the tokenizer of {model}, more than "
            f"context_tokens {config.context_tokens}: raise --context-tokens"
        )
    return planted(_largest(_MIN_WORDS, most, lambda n: num_tokens(n) <= config.context_tokens))


def _largest(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """Returns the largest number in [low, high] for which `holds`, given that it does for low."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _encode_context(
    tokenizer: Tokenizer, passage: Passage, model: str
) -> tuple[list[int], list[list[int]]]:
    """Tokens of a passage, and the indices of the tokens of every fact's answer."""
    ids, offsets = tokenizer.encode_with_offsets(passage.text)
    answers = [
        _tokens_of(tokenizer, ids, offsets, fact.answer, at, model)
        for fact, at in zip(passage.facts, passage.answers_at, strict=True)
    ]
    return ids, answers


def _encode_tail(tokenizer: Tokenizer, fact: Fact, model: str) -> _Encoded:
    """Tokens of a question with its answer."""
    text = f"{fact.asked} {fact.answer}"
    ids, offsets = tokenizer.encode_with_offsets(text, add_special_tokens=False)
    at = len(text) - len(fact.answer)
    return _Encoded(ids, _tokens_of(tokenizer, ids, offsets, fact.answer, at, model))


def _tokens_of(
    tokenizer: Tokenizer,
    ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    answer: str,
    start: int,
    model: str,
) -> list[int]:
    """The indices of the tokens that hold characters of an answer, which begins at `start`."""
    stop = start + len(answer)
    at = [i for i, (first, last) in enumerate(offsets) if first < stop and last > start]
    if answer not in tokenizer.decode([ids[i] for i in at]):
        raise ValueError(
            f"the tokenizer of {model}, which has {tokenizer.vocab_size} tokens, cannot represent "
            f"{answer!r}: head scores are learned from English texts"
        )
    return at


def _example(
    context: tuple[list[int], list[list[int]]],
    tails: Sequence[_Encoded],
    sizes: tuple[int, int, int],
) -> Example:
    """Pads a context and its tails to the sizes of a context, a tail and an answer."""
    context_size, tail_size, answer_size = sizes
    ids, answers = context
    is_fact = np.zeros((len(tails), context_size), bool)
    padded_tails = np.zeros((len(tails), tail_size), np.int32)
    predicts = np.zeros((len(tails), answer_size), np.int32)
    targets, weights = np.zeros_like(predicts), np.zeros(predicts.shape, np.float32)
    for row, (tail, answer) in enumerate(zip(tails, answers, strict=True)):
        is_fact[row, answer] = True
        padded_tails[row, : len(tail.ids)] = tail.ids
        used = slice(0, len(tail.at))
        predicts[row, used] = row * tail_size + np.array(tail.at) - 1
        targets[row, used] = np.array(tail.ids)[tail.at]
        weights[row, used] = 1
    return Example(
        context=jnp.asarray(np.pad(np.array(ids, np.int32), (0, context_size - len(ids)))),
        length=jnp.int32(len(ids)),
        tails=jnp.asarray(padded_tails),
        is_fact=jnp.asarray(is_fact),
        predicts=jnp.asarray(predicts.reshape(-1)),
        targets=jnp.asarray(targets.reshape(-1)),
        weights=jnp.asarray(weights.reshape(-1) / weights.sum()),
    )
