"""Sampling parameters of one request."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 300
"""Maximum number of tokens in `logit_bias`."""
MAX_STOP_TOKEN_IDS = 128
"""Maximum number of tokens in `stop_token_ids`."""
NO_TOKEN = -1
"""Stands for the token of a row whose logits are not finite."""
MAX_GRAMMAR_CHARACTERS = 1 << 17
"""Maximum length of a schema, regular expression or grammar; longer ones compile for seconds."""

REASONING = ("optional", "required")
"""Values of `StructuredOutputsParams.reasoning`."""


@dataclass(frozen=True)
class StructuredOutputsParams:
    """A constraint on the output. Exactly one field must be given besides `reasoning`.

    The names of the other fields are vLLM's.

    Schemas and grammars are checked when they are compiled, not here.

    >>> from fairkv_jax.sampling_params import StructuredOutputsParams
    >>> SamplingParams(structured_outputs=StructuredOutputsParams(choice=["yes", "no"]))
    ... # doctest: +ELLIPSIS
    SamplingParams(...choice=('yes', 'no')...)

    Raises:
        ValueError: no field or several fields are given, or a value has the wrong type.
    """

    json: str | Mapping[str, Any] | None = None
    """A JSON schema, as text or as an object; it is stored as text."""
    regex: str | None = None
    choice: tuple[str, ...] | list[str] | None = None
    """The output must be one of these texts."""
    grammar: str | None = None
    """A context-free grammar in Lark or GBNF notation."""
    json_object: bool | None = None
    """The output must be a JSON object."""
    reasoning: str | None = None
    """Whether reasoning, which is free and ends with `</think>`, comes before what the other field
    constrains: "required", or "optional" if the output shows by `<think>` that it begins with it.
    None: no."""

    def __post_init__(self) -> None:
        given = [name for name in _CONSTRAINTS if getattr(self, name) is not None]
        if self.json_object is False:
            given.remove("json_object")
        if len(given) != 1:
            raise ValueError(
                f"exactly one of {', '.join(_CONSTRAINTS)} must be given, "
                f"got {', '.join(given) or 'none'}"
            )
        if isinstance(self.json, Mapping):
            object.__setattr__(self, "json", json.dumps(dict(self.json)))
        if self.choice is not None:
            choice = _as_tuple("choice", self.choice)
            if not choice or any(not isinstance(text, str) or not text for text in choice):
                raise ValueError(f"choice must be non-empty strings, got {self.choice!r}")
            object.__setattr__(self, "choice", choice)
        for name in ("json", "regex", "grammar"):
            if not isinstance(getattr(self, name), str | None):
                raise ValueError(f"{name} must be a string, got {getattr(self, name)!r}")
        if not isinstance(self.json_object, bool | None):
            raise ValueError(f"json_object must be True or False, got {self.json_object!r}")
        if self.reasoning not in (None, *REASONING):
            raise ValueError(
                f"reasoning must be {' or '.join(REASONING)}, or None, got {self.reasoning!r}"
            )
        texts = (self.json, self.regex, self.grammar, *(self.choice or ()))
        size = sum(len(text) for text in texts if text is not None)
        if size > MAX_GRAMMAR_CHARACTERS:
            raise ValueError(
                f"{given[0]} takes at most {MAX_GRAMMAR_CHARACTERS} characters, got {size}"
            )


_MAX_INT = 2**31 - 1
"""The largest value of integers that have no limit of their own: devices compute in int32."""
_CONSTRAINTS = ("json", "regex", "choice", "grammar", "json_object")


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of one request. Names, defaults and the order of steps are vLLM's.

    The logits are first masked by `structured_outputs`. Then `logit_bias` is added, tokens that
    would end the output before `min_tokens` are masked, and the penalties are applied. Finally the
    logits are divided by `temperature` and filtered by `min_p`, `top_k` and `top_p`, in this order.
    Reported log-probabilities are those of the model, before all of these steps.

    >>> from fairkv_jax import SamplingParams
    >>> SamplingParams(temperature=0, max_tokens=32, stop="END").stop
    ('END',)

    Raises:
        ValueError: a value is out of range or has the wrong type; the message names the limit.
    """

    max_tokens: int | None = 16
    """Maximum tokens to generate. 0: only prefill the prompt. None: up to the context length."""
    min_tokens: int = 0
    """Minimum tokens to generate before a stop string or a stop token may end the output."""
    temperature: float = 1.0
    """Divides the logits; 0 selects the most likely token."""
    top_k: int = 0
    """Number of most likely tokens to sample from; 0 or -1: all."""
    top_p: float = 1.0
    """Cumulative probability of the most likely tokens to sample from, in (0, 1]."""
    min_p: float = 0.0
    """Minimum probability relative to that of the most likely token, in [0, 1]."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that occur in the output, in [-2, 2]."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for every occurrence in the output, in [-2, 2]."""
    repetition_penalty: float = 1.0
    """Divides positive logits, and multiplies negative ones, of tokens in the prompt or output."""
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] | None = None
    """Values in [-100, 100] to add to the logits, by token id; stored as pairs."""
    structured_outputs: StructuredOutputsParams | None = None
    seed: int | None = None
    """Random seed. The same seed gives the same output in any batch. None: the engine draws one."""
    stop: str | tuple[str, ...] | list[str] | None = None
    stop_token_ids: tuple[int, ...] | list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    """Most likely tokens to report beside the sampled one; None: report no log-probabilities."""
    prompt_logprobs: int | None = None
    """Like `logprobs`, for all tokens of the prompt except the first."""
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        stop = _as_tuple("stop", (self.stop,) if isinstance(self.stop, str) else self.stop)
        stop_token_ids = _as_tuple("stop_token_ids", self.stop_token_ids)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", stop_token_ids)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 0)
        _check_int("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens must be at most max_tokens {self.max_tokens}, got {self.min_tokens}"
            )
        _check_float("temperature", self.temperature, 0.0, math.inf)
        _check_float("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_int("top_k", self.top_k, -1)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_float("repetition_penalty", self.repetition_penalty, 0.0, math.inf, low_open=True)
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", _check_logit_bias(self.logit_bias))
        if self.seed is not None:
            _check_int("seed", self.seed, -(2**63), 2**64 - 1)
        if self.logprobs is not None:
            _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.prompt_logprobs is not None:
            _check_int("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        if any(not isinstance(s, str) or not s for s in stop):
            raise ValueError(f"stop must be non-empty strings, got {self.stop!r}")
        for token_id in stop_token_ids:
            _check_int("stop_token_ids", token_id, 0)
        if len(stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise ValueError(
                f"stop_token_ids takes at most {MAX_STOP_TOKEN_IDS} ids, got {len(stop_token_ids)}"
            )
        outputs = self.structured_outputs
        if not isinstance(outputs, StructuredOutputsParams | None):
            raise ValueError(
                f"structured_outputs must be StructuredOutputsParams or None, got {outputs!r}"
            )
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")


def _as_tuple(name: str, value: object) -> tuple:
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name} must be a list, got {value!r}")
    return tuple(value)


def _check_logit_bias(value: object) -> tuple[tuple[int, float], ...]:
    """Checks the keys and values of `logit_bias` and returns them as pairs."""
    if isinstance(value, tuple):
        value = dict(value)
    if not isinstance(value, Mapping):
        raise ValueError(f"logit_bias must map token ids to numbers, got {value!r}")
    if len(value) > MAX_LOGIT_BIAS:
        raise ValueError(f"logit_bias takes at most {MAX_LOGIT_BIAS} tokens, got {len(value)}")
    for token_id, bias in value.items():
        _check_int("a token id in logit_bias", token_id, 0)
        _check_float(f"logit_bias of token {token_id}", bias, -100.0, 100.0)
    return tuple(value.items())


def _check_int(name: str, value: object, low: int, high: int = _MAX_INT) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    value = int(value)
    if not low <= value <= high:
        at_least = value < low and high == _MAX_INT
        limit = f"at least {low}" if at_least else f"between {low} and {high}"
        raise ValueError(f"{name} must be {limit}, got {value}")


def _check_float(
    name: str, value: object, low: float, high: float, *, low_open: bool = False
) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name} must be a number, got {value!r}")
    value = float(value)
    in_range = (low < value if low_open else low <= value) and value <= high
    if not in_range or not math.isfinite(value):
        opening = "above" if low_open else "at least"
        ceiling = "" if math.isinf(high) else f" and at most {high:g}"
        raise ValueError(f"{name} must be a finite number {opening} {low:g}{ceiling}, got {value}")


def num_bitmask_words(vocab_size: int) -> int:
    """Returns the number of 32-bit words in a grammar bitmask, which has one bit per token."""
    return -(-vocab_size // 32)
