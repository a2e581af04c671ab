"""Requests and outputs of the engine. The names of outputs are vLLM's."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int

from fairkv_jax.config import KVConfig
from fairkv_jax.engine.prefix_cache import Prefix
from fairkv_jax.engine.stats import RequestMetrics
from fairkv_jax.engine.structured_output import GrammarMatcher
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
    """The output of a request that has been generated so far.

    >>> output.outputs[0].finish_reason
    'length'
    """

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
    """The state of a request after a step. The output is cumulative.

    >>> (output,) = llm.generate(["one two three"], SamplingParams(max_tokens=4, ignore_eos=True))
    >>> output.finished, output.prompt
    (True, 'one two three')
    """

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
    num_cached_tokens: int | None = None
    """Prompt tokens whose compressed cache was there already; None before the prefill."""
    cached_prefix: "CachedPrefix | None" = None
    """The prefix that the request has cached, if it was to cache one."""
    error: str | None = None
    """Why the request failed; its output, with the finish reason "error", is not to be used."""


@dataclass(frozen=True)
class Boundary:
    """A place in a prompt where a segment may end that other prompts begin with."""

    position: int
    """Tokens of the prompt before it."""
    is_marked: bool = False
    """Whether the client has marked it by `cache_control`."""
    ends_answer: bool = False
    """Whether the model has generated the tokens since the boundary before."""


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
    kv_ratio: float | None = None
    """Overrides the engine's KV ratio; may not keep more."""
    prefix_id: str | None = None
    """The cached prefix that the prompt continues; its tokens are not part of the prompt."""
    messages: tuple[Mapping[str, Any], ...] | None = None
    """What the prompt was made from, if it is a conversation; needed if others continue it."""
    caches_prefix: bool = False
    """Whether the prompt is to become a cached prefix; then nothing is generated."""
    require_query_agnostic: bool = True
    """Whether a prefix may only be compressed by what does not depend on its end."""
    owner: str = ""
    """Prefixes are found only by requests of their owner."""
    cache_salt: str = ""
    """Equal prefixes of different salts are different ones."""
    boundaries: tuple[Boundary, ...] = ()
    """Where its segments may end, in ascending order, see `segments.divide`."""
    same_prompt: str = ""
    """Requests with the same name here have the same prompt and KV options: one is prefilled."""
    may_continue: bool = False
    """Whether prompts that begin with this one and its output are likely to follow."""


@dataclass(frozen=True)
class PrefixRecord:
    """A prefix, and the request that computes it."""

    prefix: Prefix
    request: Request

    @property
    def id(self) -> str:
        return self.prefix.key


@dataclass(frozen=True)
class CachedPrefix:
    """A compressed prefix that requests can begin with, see `LLM.cache_prefix`.

    >>> document = llm.cache_prefix("one two three " * 30)
    >>> document.kept_tokens.shape, float(document.kept_tokens.mean())  # [L, K]
    ((2, 3), 64.0)
    """

    id: str
    num_tokens: int
    """Also those that compression has dropped."""
    kept_tokens: Int[np.ndarray, "L K"]
    bytes: int
    """What its pages take, over all devices."""


@dataclass(frozen=True)
class Part:
    """Consecutive tokens of a prompt that are compressed together."""

    start: int
    stop: int
    """Tokens [start, stop) of the prompt."""
    options: KVConfig
    """How they are compressed; `KVConfig()`: they are kept whole."""

    @property
    def is_whole(self) -> bool:
        return self.options == KVConfig()


@dataclass(frozen=True)
class ValidatedRequest:
    """A request that the engine has validated and can serve."""

    request: Request
    """Its prompt is whole: it begins with the prefix, if there is one."""
    max_tokens: int
    """Maximum tokens to generate: the requested number, limited by the context."""
    prefix: PrefixRecord | None = None
    """The prefix that the prompt begins with; or is, if the request is to cache it."""
    matcher: GrammarMatcher | None = None
    """The beginning of its grammar; None: any token may be generated."""
    parts: tuple[Part, ...] = ()
    """What follows that prefix: the segments that other prompts may share, then the last one."""
    arrival_time: float = field(default_factory=time.monotonic)
    """When it was validated, in seconds of `time.monotonic`."""

    @property
    def request_id(self) -> str:
        return self.request.request_id
