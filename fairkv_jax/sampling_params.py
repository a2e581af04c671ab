"""How the tokens of one request are chosen, and when it ends."""

import math
from dataclasses import dataclass
from numbers import Integral, Real

MAX_LOGPROBS = 20


@dataclass(frozen=True)
class SamplingParams:
    """Sampling options of one request; names and defaults are vLLM's.

    The logits are divided by `temperature` (0 is greedy), then cut by `min_p`, `top_k` and
    `top_p` in this order. Log-probabilities are those of the model, before any of these.

    Raises:
        ValueError: a value is out of its range or of a wrong type; the message names the limit.
    """

    max_tokens: int | None = 16
    """Most tokens to generate; None: as many as the context holds."""
    temperature: float = 1.0
    top_k: int = 0
    """Keep the k likeliest tokens; 0 or -1 keeps all."""
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    """The same seed gives the same text, whatever else is in the batch. None: the engine draws."""
    stop: str | tuple[str, ...] | list[str] | None = None
    stop_token_ids: tuple[int, ...] | list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    """Log-probabilities of the chosen token (0) and of the n likeliest ones; None: none."""
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        stop = _as_tuple("stop", (self.stop,) if isinstance(self.stop, str) else self.stop)
        stop_token_ids = _as_tuple("stop_token_ids", self.stop_token_ids)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", stop_token_ids)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1)
        _check_float("temperature", self.temperature, 0.0, math.inf)
        _check_float("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_int("top_k", self.top_k, -1)
        if self.seed is not None:
            _check_int("seed", self.seed, -(2**63), 2**64 - 1)
        if self.logprobs is not None:
            _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if any(not isinstance(s, str) or not s for s in stop):
            raise ValueError(f"stop must be non-empty strings, got {self.stop!r}")
        for token_id in stop_token_ids:
            _check_int("stop_token_ids", token_id, 0)
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")


def _as_tuple(name: str, value: object) -> tuple:
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name} must be a list, got {value!r}")
    return tuple(value)


def _check_int(name: str, value: object, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    value = int(value)
    if value < low or (high is not None and value > high):
        limit = f"at least {low}" if high is None else f"between {low} and {high}"
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
