"""Structured outputs: which tokens may come next in an output that follows a schema or grammar.

The host asks llguidance token by token; the devices read the answer as a bitmask in `sample`.
"""

import json
import re
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import UInt32
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from

from fairkv_jax.bounded_worker import LimitExceeded, WorkerLimits, WorkerPool, memory_in_use
from fairkv_jax.config import GrammarLimits
from fairkv_jax.sampling_params import StructuredOutputsParams, num_bitmask_words
from fairkv_jax.tokenizer import Tokenizer

GRAMMAR_WORKERS = 2
"""Grammars that are compiled at a time."""
_MAX_COMPILED = 64
_MAX_REFUSED = 256
_MAX_BYTES = 1 << 30
"""Memory of all compiled grammars together, those of running and queued requests included."""
_MIN_BYTES = 64 << 10
"""The least that a compiled grammar counts for."""
_MAX_LEXER_STATES = 50_000
"""Lexer states of one grammar, at one or two KB each."""
_MAX_FAULT_CHARACTERS = 200


class TooManyGrammars(Exception):
    """The grammars of the running and queued requests take all the memory that they may take."""


@dataclass(frozen=True)
class _Vocabulary:
    """What the compilation of a grammar depends on besides the grammar; JSON can represent it."""

    tokenizer: str
    """The contents of tokenizer.json."""
    vocab_size: int
    eos_token_ids: list[int]

    def load(self) -> LLTokenizer:
        """Raises ValueError if no grammar can be laid over the tokenizer."""
        try:
            return LLTokenizer(
                self.tokenizer, n_vocab=self.vocab_size, eos_token=self.eos_token_ids
            )
        except ValueError as error:
            raise ValueError(f"outputs of this model cannot be constrained: {error}") from error


@dataclass(eq=False)
class _Compiled:
    """A compiled grammar, and about how many bytes it takes."""

    matcher: LLMatcher
    num_bytes: int


class _Usage:
    """The bytes of the grammars that are cached or that requests refer to."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._lock = threading.RLock()  # Garbage collection may call `release` at any time.

    def hold(self, compiled: _Compiled) -> None:
        """Counts a grammar as long as it exists."""
        with self._lock:
            self.num_bytes += compiled.num_bytes
        weakref.finalize(compiled, self._release, compiled.num_bytes).atexit = False

    def _release(self, num_bytes: int) -> None:
        with self._lock:
            self.num_bytes -= num_bytes


class GrammarCompiler:
    """Compiles schemas and grammars for one vocabulary, and caches the last compiled ones.

    A grammar of a few bytes can take any amount of time and memory to compile. It is therefore
    compiled in a worker process first, within limits. Compiled grammars cannot be moved between
    processes, so it is compiled again here once the worker has shown that it stays within the
    limits: compiling is deterministic. Ordinary schemas take a few milliseconds. Any thread may
    call it.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, limits: GrammarLimits | None = None):
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._num_words = num_bitmask_words(vocab_size)
        self._limits = limits or GrammarLimits()
        self._compiled: OrderedDict[StructuredOutputsParams, _Compiled] = OrderedDict()
        self._refused: OrderedDict[StructuredOutputsParams, str] = OrderedDict()
        """Grammars beyond the limits, which are not tried again, and why."""
        self._usage = _Usage()
        self._lock = threading.Lock()

    def warm_up(self) -> None:
        """Starts a worker, so that the first grammar does not have to wait for it."""
        self._pool.warm_up()

    def matcher(
        self, params: StructuredOutputsParams, cancelled: threading.Event | None = None
    ) -> "GrammarMatcher":
        """A matcher at the beginning of an output.

        Raises:
            ValueError: the schema or grammar is invalid or too large, nothing matches it, or it is
                beyond the limits; the message says which.
            TooManyGrammars: there is no memory left for another grammar at the moment.
            CallCancelled: `cancelled` was set before the grammar was compiled.
        """
        compiled = self._cached(params)
        if compiled is None:
            num_bytes = self._try_out(params, cancelled)
            with self._lock:
                self._make_room(num_bytes)
            matcher = _compile(params, self._vocabulary, self._num_words)
            compiled = _Compiled(matcher, num_bytes)
            self._usage.hold(compiled)
            with self._lock:
                self._compiled[params] = compiled
        return GrammarMatcher(compiled.matcher, self._num_words, compiled).copy()

    def _cached(self, params: StructuredOutputsParams) -> _Compiled | None:
        with self._lock:
            if params in self._refused:
                raise ValueError(self._refused[params])
            if params in self._compiled:
                self._compiled.move_to_end(params)
            return self._compiled.get(params)

    def _try_out(self, params: StructuredOutputsParams, cancelled: threading.Event | None) -> int:
        """Compiles in a worker process and returns the bytes that the grammar takes."""
        try:
            return self._pool.call(asdict(params), cancelled)
        except LimitExceeded as error:
            message = self._why(error.limit)
            with self._lock:
                self._refused[params] = message
                if len(self._refused) > _MAX_REFUSED:
                    self._refused.popitem(last=False)
            raise ValueError(message) from error

    def _why(self, limit: str) -> str:
        limits = self._limits
        if limit == "time":
            return (
                f"it takes more than {limits.timeout_s:g} seconds to compile, the limit that "
                "grammar_timeout sets: simplify it"
            )
        return (
            f"it takes more than {limits.memory_bytes >> 20} MiB of memory to compile, the limit "
            "that grammar_memory_bytes sets: simplify it"
        )

    def _make_room(self, num_bytes: int) -> None:
        """Drops cached grammars that no request uses, the oldest first, until there is room."""
        while self._compiled and (
            self._usage.num_bytes + num_bytes > _MAX_BYTES or len(self._compiled) >= _MAX_COMPILED
        ):
            self._compiled.popitem(last=False)
        if self._usage.num_bytes + num_bytes > _MAX_BYTES:
            raise TooManyGrammars(
                f"the schemas and grammars of other requests take {self._usage.num_bytes >> 20} of "
                f"{_MAX_BYTES >> 20} MiB: try again later, or send a simpler one"
            )

    @cached_property
    def _vocabulary(self) -> LLTokenizer:
        return self._parts.load()

    @cached_property
    def _parts(self) -> _Vocabulary:
        ends = sorted(self._tokenizer.eos_token_ids)
        return _Vocabulary(self._tokenizer.to_json(), self._vocab_size, ends)

    @cached_property
    def _pool(self) -> WorkerPool:
        limits = WorkerLimits(self._limits.timeout_s, self._limits.memory_bytes)
        target = f"{__name__}:make_trial"
        return WorkerPool(target, asdict(self._parts), limits, num_workers=GRAMMAR_WORKERS)


def make_trial(setup: dict[str, Any]) -> Callable[[dict[str, Any]], int]:
    """Returns the function that the worker runs: it compiles and returns the bytes needed."""
    parts = _Vocabulary(**setup)
    num_words = num_bitmask_words(parts.vocab_size)
    vocabulary: LLTokenizer | None = None

    def compile_and_measure(fields: dict[str, Any]) -> int:
        nonlocal vocabulary
        vocabulary = vocabulary or parts.load()
        before = memory_in_use()[1]
        compiled = _compile(StructuredOutputsParams(**fields), vocabulary, num_words)
        after = memory_in_use()[1]
        del compiled
        return max(_MIN_BYTES, after - before)

    with suppress(ValueError):  # Every call reports it.
        vocabulary = parts.load()
    return compile_and_measure


def _compile(params: StructuredOutputsParams, vocabulary: LLTokenizer, num_words: int) -> LLMatcher:
    """Compiles a grammar; raises ValueError as `GrammarCompiler.matcher` does."""
    limits = LLParserLimits(verbose_errors=False, max_lexer_states=_MAX_LEXER_STATES)
    try:
        grammar = _grammar(params)
        if params.reasoning is not None:
            grammar = _after_reasoning(grammar, params.reasoning, vocabulary)
        matcher = LLMatcher(vocabulary, grammar, limits=limits, log_level=0)
    except ValueError as error:
        raise ValueError(_fault(str(error))) from error
    # Some faults show only at the first tokens, whose bitmasks take the longest.
    trial = GrammarMatcher(matcher, num_words)
    first = _lowest_token(trial.bitmask())
    if not trial.has_failed:
        trial = trial.copy()
        trial.accept(first)
        trial.bitmask()
    if trial.has_failed:
        raise ValueError(_fault(trial.error))
    return matcher


class GrammarMatcher:
    """How far one output has come in its grammar."""

    def __init__(self, matcher: LLMatcher, num_words: int, source: _Compiled | None = None):
        """`source` counts as in use as long as the matcher exists."""
        self._matcher = matcher
        self._num_words = num_words
        self._source = source

    def copy(self) -> "GrammarMatcher":
        """A matcher in the same state that advances on its own."""
        return GrammarMatcher(self._matcher.deep_copy(), self._num_words, self._source)

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


def _after_reasoning(answer: str, reasoning: str, vocabulary: LLTokenizer) -> str:
    """Puts free reasoning, which ends with `</think>`, before what a grammar describes.

    llguidance matches tokens that were added to a vocabulary by name only, and never as text.
    """
    start, body = ['"<think>"', '[suffix="</think>"]: /(?s:.*)/']
    if _is_added("</think>", vocabulary):
        body = ": FREE </think>\nFREE: /(?s:.*)/"
    if _is_added("<think>", vocabulary):
        start = "<think>"
    beginning = "opening? body" if reasoning == "required" else "(gap opening body)?"
    grammar = f"start: {beginning} gap @answer\ngap: /\\s*/\nopening: {start}\nbody{body}\n"
    try:
        first, *others = json.loads(answer)["grammars"]
    except ValueError:  # it is in Lark's notation
        first, others = {"lark_grammar": answer}, []
    grammars = [{"lark_grammar": grammar}, {**first, "name": "answer"}, *others]
    return json.dumps({"grammars": grammars})


def _is_added(text: str, vocabulary: LLTokenizer) -> bool:
    token_ids = vocabulary.tokenize_str(text)
    return len(token_ids) == 1 and vocabulary.is_special_token(token_ids[0])


def _fault(message: str) -> str:
    """llguidance's message without its drawing of the place, which quotes a text of any length."""
    if "NoExtension" in message:
        message = "no output matches it"
    said = re.search(r"^error: (.*)$", message, re.MULTILINE)  # of regular expressions
    lines = (said.group(1) if said else message).strip().splitlines() or ["it does not compile"]
    return lines[0][:_MAX_FAULT_CHARACTERS]
