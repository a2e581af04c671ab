"""What comes into the engine and what goes out of it; the outputs' names are vLLM's."""

from dataclasses import dataclass, field

import numpy as np

from fairkv_jax.engine.stats import RequestMetrics
from fairkv_jax.sampling_params import SamplingParams


@dataclass(frozen=True)
class Logprob:
    """The log-probability of one token at one place of the output."""

    logprob: float
    rank: int
    """1 is the likeliest token."""
    decoded_token: str


@dataclass
class CompletionOutput:
    """What has been generated so far for a request."""

    text: str
    """Safe to show: while the request runs, what may become a stop string is held back."""
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    """For each token, itself and the likeliest ones by token id; None unless asked for."""
    finish_reason: str | None = None
    """"stop", "length", or None while the request runs; "error": its grammar could not go on."""
    stop_reason: int | str | None = None
    """The stop token or stop string that ended it; None for the end-of-text token."""
    index: int = 0


@dataclass
class RequestOutput:
    """The state of a request after a step: its whole output so far, not the difference."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    kv_lengths: np.ndarray | None = None
    """Kept prompt tokens per layer and KV head, [L, K]; None before the prefill."""
    kept_positions: list[list[np.ndarray]] | None = None
    """For each layer and KV head the kept prompt positions, ascending; None unless asked for."""
    metrics: RequestMetrics | None = None
    """When it came, started and advanced."""
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """For each token of the prompt, as in `logprobs`; None for the first, which nothing precedes,
    and in all unless asked for."""


@dataclass(frozen=True)
class Request:
    """A prompt, as token ids, and how to continue it."""

    request_id: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams = field(default_factory=SamplingParams)
    prompt: str | None = None
    return_kept_positions: bool = False
    kv_policy: str | None = None
    """In place of the engine's own, see `compress.budgets.request_kv_config`."""
    kv_budget: int | None = None
    """In place of the engine's own, and no larger."""


@dataclass(frozen=True)
class ValidatedRequest:
    """A request that the engine has found that it can serve."""

    request: Request
    max_tokens: int
    """Most tokens to generate: as many as are asked for and as the context holds."""

    @property
    def request_id(self) -> str:
        return self.request.request_id
