"""A request on its way: its tokens, its text, and whether it is over."""

import time
from dataclasses import replace

from fairkv_jax.config import KVConfig
from fairkv_jax.engine.engine import PrefillTask
from fairkv_jax.engine.guided import Matcher
from fairkv_jax.engine.request import CompletionOutput, Logprob, Request, RequestOutput
from fairkv_jax.engine.stats import RequestMetrics
from fairkv_jax.prefill import KeptTokens
from fairkv_jax.sampling_params import SamplingParams
from fairkv_jax.tokenizer import Tokenizer


class Sequence:
    """One request while it waits and runs; the engine's threads never share it."""

    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer,
        *,
        arrival: int,
        seed: int,
        max_tokens: int,
        kv_config: KVConfig,
        matcher: Matcher | None = None,
    ):
        self.request = request
        self.kv_config = kv_config
        self.arrival = arrival
        self.seed = seed
        self.token_ids: list[int] = []
        """Generated so far; they survive a preemption."""
        self.num_cached = 0
        """Generated tokens whose keys and values lie in the cache, or are on their way to it."""
        self.prefill: PrefillTask | None = None
        """Under way, or done while it waits for pages."""
        self.kept: KeptTokens | None = None
        self.matcher = matcher
        """How far its output has come in its grammar; None: anything may be generated."""
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        self.finish_reason: str | None = None
        self._metrics = RequestMetrics(arrival_time=time.monotonic())
        self._stop_reason: int | str | None = None
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._detokenizer = tokenizer.detokenizer(
            self.params.skip_special_tokens, context=request.prompt_token_ids[-1:]
        )
        self._text = ""
        self._logprobs: list[dict[int, Logprob]] | None = (
            None if self.params.logprobs is None else []
        )

    @property
    def params(self) -> SamplingParams:
        return self.request.sampling_params

    @property
    def all_token_ids(self) -> list[int]:
        """The prompt, and what has been generated."""
        return self.request.prompt_token_ids + self.token_ids

    @property
    def position(self) -> int:
        """Of the token that the next step appends to the cache."""
        return len(self.request.prompt_token_ids) + self.num_cached

    @property
    def num_left(self) -> int:
        """Steps until it has all the tokens that it may generate."""
        return self._max_tokens - self.num_cached - 1

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether those are wanted and not there yet."""
        return self.params.prompt_logprobs is not None and self.prompt_logprobs is None

    @property
    def wants_tokens(self) -> bool:
        """Whether any are to be generated; else the prompt is only read."""
        return self._max_tokens > 0

    def scheduled(self) -> None:
        """Notes that its prefill begins; again after a preemption, which does not count."""
        if self._metrics.first_scheduled_time is None:
            self._metrics.first_scheduled_time = time.monotonic()

    def end_with_prompt(self) -> None:
        """Ends the sequence that wants no tokens."""
        self._metrics.prefill_finished_time = time.monotonic()
        self._finish("length", None)

    def append(self, token_id: int, logprobs: dict[int, Logprob] | None) -> None:
        """Takes a sampled token, and ends the sequence where it is due."""
        self.token_ids.append(token_id)
        self._metrics.last_token_time = time.monotonic()
        if self._metrics.prefill_finished_time is None:
            self._metrics.prefill_finished_time = self._metrics.last_token_time
        if self._logprobs is not None and logprobs is not None:
            self._logprobs.append(logprobs)
        if self.matcher is not None:
            self.matcher.accept(token_id)
        is_end = token_id in self._tokenizer.eos_token_ids and not self.params.ignore_eos
        if is_end or token_id in (self.params.stop_token_ids or ()):
            if self.params.include_stop_str_in_output:
                self._text += self._detokenizer.push(token_id)
            self._finish("stop", None if is_end else token_id)
            return
        searched = len(self._text)
        self._text += self._detokenizer.push(token_id)
        self._stop_at_string(searched)
        if self.finish_reason is None and self.matcher is not None and self.matcher.is_over:
            self._finish("error" if self.matcher.has_failed else "stop", None)
        if self.finish_reason is None and len(self.token_ids) >= self._max_tokens:
            self._finish("length", None)

    def output(self) -> RequestOutput:
        """The request's state, safe to show."""
        shown = len(self._text)
        if self.finish_reason is None:
            shown -= _held_back(self._text, self._stops)
        completion = CompletionOutput(
            text=self._text[:shown],
            token_ids=list(self.token_ids),
            logprobs=None if self._logprobs is None else list(self._logprobs),
            finish_reason=self.finish_reason,
            stop_reason=self._stop_reason,
        )
        return RequestOutput(
            request_id=self.request.request_id,
            prompt=self.request.prompt,
            prompt_token_ids=self.request.prompt_token_ids,
            outputs=[completion],
            finished=self.finish_reason is not None,
            prompt_logprobs=self.prompt_logprobs,
            kv_lengths=None if self.kept is None else self.kept.lengths,
            kept_positions=None if self.kept is None else self.kept.positions,
            metrics=replace(self._metrics),
        )

    @property
    def _stops(self) -> tuple[str, ...]:
        return tuple(self.params.stop or ())

    def _finish(self, reason: str, stop_reason: int | str | None) -> None:
        self.finish_reason, self._stop_reason = reason, stop_reason
        searched = len(self._text)
        self._text += self._detokenizer.flush()
        if reason == "length":
            self._stop_at_string(searched)

    def _stop_at_string(self, searched: int) -> None:
        """Ends at the first stop string that the text behind `searched` completes."""
        if len(self.token_ids) <= self.params.min_tokens:
            return
        found = [
            (self._text.find(stop, max(0, searched - len(stop) + 1)), stop) for stop in self._stops
        ]
        found = [(at, stop) for at, stop in found if at >= 0]
        if not found:
            return
        at, stop = min(found)
        if self.params.include_stop_str_in_output:
            at += len(stop)
        self._text = self._text[:at]
        self.finish_reason, self._stop_reason = "stop", stop


def _held_back(text: str, stops: tuple[str, ...]) -> int:
    """Characters at the text's end that may yet become a stop string."""
    return max(
        (
            size
            for stop in stops
            for size in range(1, min(len(stop) - 1, len(text)) + 1)
            if stop.startswith(text[-size:])
        ),
        default=0,
    )
