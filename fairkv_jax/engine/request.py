"""Requests and outputs of the engine. The names of outputs are vLLM's."""

from dataclasses import dataclass, field

import numpy as np

from fairkv_jax.engine.stats import RequestMetrics
from fairkv_jax.sampling_params import SamplingParams


@dataclass(frozen=True)
class Logprob:
    """The log-probability of one token at one position."""

    logprob: float
    rank: int
    """Rank among all tokens; the most likely token has rank 1."""
    decoded_token: str


@dataclass
class CompletionOutput:
    """The output of a request that has been generated so far."""

    text: str
    """While the request runs, text that may be the beginning of a stop string is held back."""
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    """Per position, the sampled token and the most likely ones by id; None unless requested."""
    finish_reason: str | None = None
    """"stop", "length", "error" if the grammar failed, or None while the request runs."""
    stop_reason: int | str | None = None
    """The stop token or stop string that ended the output; None for the end-of-text token."""
    index: int = 0


@dataclass
class RequestOutput:
    """The state of a request after a step. The output is cumulative."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    kv_lengths: np.ndarray | None = None
    """Kept prompt tokens per layer and KV head, [L, K]; None before the prefill."""
    kept_positions: list[list[np.ndarray]] | None = None
    """Kept prompt positions per layer and KV head, ascending; None unless requested."""
    metrics: RequestMetrics | None = None
    """Arrival and progress times of the request."""
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """Per prompt token, as in `logprobs`, with None for the first token; None unless requested."""


@dataclass(frozen=True)
class Request:
    """A prompt as token ids, its sampling parameters and its KV options."""

    request_id: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams = field(default_factory=SamplingParams)
    prompt: str | None = None
    return_kept_positions: bool = False
    kv_policy: str | None = None
    """Overrides the engine's KV policy, see `compress.budgets.request_kv_config`."""
    kv_budget: int | None = None
    """Overrides the engine's KV budget; may not be larger."""


@dataclass(frozen=True)
class ValidatedRequest:
    """A request that the engine has validated and can serve."""

    request: Request
    max_tokens: int
    """Maximum tokens to generate: the requested number, limited by the context."""

    @property
    def request_id(self) -> str:
        return self.request.request_id
