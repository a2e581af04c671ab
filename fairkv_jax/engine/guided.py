"""Outputs that match a schema, an expression or a grammar: which tokens may come next.

The host says it, token by token, by llguidance; the devices read it as a mask in `sample`.
"""

import json
import re
from functools import cached_property, lru_cache

import numpy as np
from jaxtyping import UInt32
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from

from fairkv_jax.sampling import mask_words
from fairkv_jax.sampling_params import StructuredOutputsParams
from fairkv_jax.tokenizer import Tokenizer

_MAX_COMPILED = 64
_MAX_LEXER_STATES = 50_000
"""Of one grammar, at one or two KB each."""
_MAX_FAULT_CHARACTERS = 200


class Grammars:
    """Compiles what outputs must match for one vocabulary, and keeps the last ones compiled.

    Any thread may call it: what a client sends can take a second to compile.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._compiled = lru_cache(_MAX_COMPILED)(self._compile)

    def matcher(self, params: StructuredOutputsParams) -> "Matcher":
        """At the beginning of an output.

        Raises:
            ValueError: the schema or grammar has a fault, which the message names, is too large,
                or nothing matches it.
        """
        return Matcher(self._compiled(params), mask_words(self._vocab_size)).copy()

    def _compile(self, params: StructuredOutputsParams) -> LLMatcher:
        limits = LLParserLimits(verbose_errors=False, max_lexer_states=_MAX_LEXER_STATES)
        try:
            grammar = _grammar(params)
            matcher = LLMatcher(self._vocabulary, grammar, limits=limits, log_level=0)
        except ValueError as error:
            raise ValueError(_fault(str(error))) from error
        # Some faults show only at the first tokens, whose masks take the longest.
        trial = Matcher(matcher, mask_words(self._vocab_size))
        first = _lowest(trial.allowed())
        if not trial.has_failed:
            trial = trial.copy()
            trial.accept(first)
            trial.allowed()
        if trial.has_failed:
            raise ValueError(_fault(trial.error))
        return matcher

    @cached_property
    def _vocabulary(self) -> LLTokenizer:
        ends = sorted(self._tokenizer.eos_token_ids)
        tokenizer = self._tokenizer.to_json()
        try:
            return LLTokenizer(tokenizer, n_vocab=self._vocab_size, eos_token=ends)
        except ValueError as error:
            raise ValueError(f"outputs of this model cannot be constrained: {error}") from error


class Matcher:
    """How far one output has come."""

    def __init__(self, matcher: LLMatcher, num_words: int):
        self._matcher = matcher
        self._num_words = num_words

    def copy(self) -> "Matcher":
        """One that stands where this one stands, and goes its own way."""
        return Matcher(self._matcher.deep_copy(), self._num_words)

    def allowed(self) -> UInt32[np.ndarray, "W"]:
        """The tokens that may come next, a bit each, as `sample` takes them."""
        return np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: self._num_words]

    def accept(self, token_id: int) -> None:
        """Takes the token that came."""
        self._matcher.consume_token(token_id)

    @property
    def is_over(self) -> bool:
        """Whether the output is whole and nothing but its end can follow."""
        return self._matcher.is_stopped()

    @property
    def has_failed(self) -> bool:
        """Whether the grammar took more work than is granted, or a token that it forbids."""
        return self._matcher.is_error()

    @property
    def error(self) -> str:
        """What llguidance says of the failure."""
        return self._matcher.get_error()


def _lowest(mask: UInt32[np.ndarray, "W"]) -> int:
    """The lowest token of a mask; some token is always allowed, an end if nothing else."""
    return int(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))[0])


def _grammar(params: StructuredOutputsParams) -> str:
    """In llguidance's own form."""
    if params.json is not None:
        schema = str(params.json)
        try:
            json.loads(schema)
        except RecursionError:
            raise ValueError("the schema is nested too deeply") from None
        return grammar_from("json_schema", schema)
    if params.regex is not None:
        return grammar_from("regex", params.regex)
    if params.choice is not None:
        return grammar_from("choice", json.dumps(params.choice))
    if params.grammar is not None:
        return grammar_from("grammar", params.grammar)
    return grammar_from("json_schema", '{"type": "object"}')


def _fault(message: str) -> str:
    """What llguidance says, without the drawing of where, which quotes what may be long."""
    if "NoExtension" in message:
        message = "no output matches it"
    said = re.search(r"^error: (.*)$", message, re.MULTILINE)  # of regular expressions
    lines = (said.group(1) if said else message).strip().splitlines() or ["it does not compile"]
    return lines[0][:_MAX_FAULT_CHARACTERS]
