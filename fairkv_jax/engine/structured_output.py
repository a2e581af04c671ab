"""Structured outputs: which tokens may come next in an output that follows a schema or grammar.

The host asks llguidance token by token; the devices read the answer as a bitmask in `sample`.
"""

import json
import re
from functools import cached_property, lru_cache

import numpy as np
from jaxtyping import UInt32
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from

from fairkv_jax.sampling_params import StructuredOutputsParams, num_bitmask_words
from fairkv_jax.tokenizer import Tokenizer

_MAX_COMPILED = 64
_MAX_LEXER_STATES = 50_000
"""Lexer states of one grammar, at one or two KB each."""
_MAX_FAULT_CHARACTERS = 200


class GrammarCompiler:
    """Compiles schemas and grammars for one vocabulary, and caches the last compiled ones.

    Any thread may call it: a client's grammar can take a second to compile.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self._tokenizer = tokenizer
        self._num_words = num_bitmask_words(vocab_size)
        self._vocab_size = vocab_size
        self._compiled = lru_cache(_MAX_COMPILED)(self._compile)

    def matcher(self, params: StructuredOutputsParams) -> "GrammarMatcher":
        """A matcher at the beginning of an output.

        Raises:
            ValueError: the schema or grammar is invalid or too large, or nothing matches it; the
                message says which.
        """
        return GrammarMatcher(self._compiled(params), self._num_words).copy()

    def _compile(self, params: StructuredOutputsParams) -> LLMatcher:
        limits = LLParserLimits(verbose_errors=False, max_lexer_states=_MAX_LEXER_STATES)
        try:
            grammar = _grammar(params)
            matcher = LLMatcher(self._vocabulary, grammar, limits=limits, log_level=0)
        except ValueError as error:
            raise ValueError(_fault(str(error))) from error
        # Some faults show only at the first tokens, whose bitmasks take the longest.
        trial = GrammarMatcher(matcher, self._num_words)
        first = _lowest_token(trial.bitmask())
        if not trial.has_failed:
            trial = trial.copy()
            trial.accept(first)
            trial.bitmask()
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


class GrammarMatcher:
    """How far one output has come in its grammar."""

    def __init__(self, matcher: LLMatcher, num_words: int):
        self._matcher = matcher
        self._num_words = num_words

    def copy(self) -> "GrammarMatcher":
        """A matcher in the same state that advances on its own."""
        return GrammarMatcher(self._matcher.deep_copy(), self._num_words)

    def bitmask(self) -> UInt32[np.ndarray, "W"]:
        """The tokens that may come next, one bit per token, as `sample` takes them."""
        return np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: self._num_words]

    def accept(self, token_id: int) -> None:
        """Advances by the token that was sampled."""
        self._matcher.consume_token(token_id)

    @property
    def is_over(self) -> bool:
        """Whether the output is complete and nothing but its end can follow."""
        return self._matcher.is_stopped()

    @property
    def has_failed(self) -> bool:
        """Whether the grammar exceeded its limits of work, or met a token that it forbids."""
        return self._matcher.is_error()

    @property
    def error(self) -> str:
        """llguidance's message of the failure."""
        return self._matcher.get_error()


def _lowest_token(bitmask: UInt32[np.ndarray, "W"]) -> int:
    """The lowest token of a bitmask; some token is always allowed, an end if nothing else."""
    return int(np.flatnonzero(np.unpackbits(bitmask.view(np.uint8), bitorder="little"))[0])


def _grammar(params: StructuredOutputsParams) -> str:
    """The parameters as a grammar in llguidance's own form."""
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
    """llguidance's message without its drawing of the place, which quotes a text of any length."""
    if "NoExtension" in message:
        message = "no output matches it"
    said = re.search(r"^error: (.*)$", message, re.MULTILINE)  # of regular expressions
    lines = (said.group(1) if said else message).strip().splitlines() or ["it does not compile"]
    return lines[0][:_MAX_FAULT_CHARACTERS]
