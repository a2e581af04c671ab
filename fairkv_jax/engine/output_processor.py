"""Turns sampled tokens into what clients see: text, log-probabilities, and when an output ends."""

import logging
from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from fairkv_jax.engine.request import CompletionOutput, Logprob, Request, RequestOutput
from fairkv_jax.engine.scheduler_output import KeptTokens, NewTokens, SampledTokens
from fairkv_jax.engine.stats import RequestMetrics
from fairkv_jax.engine.structured_output import GrammarMatcher
from fairkv_jax.sampling_params import NO_TOKEN, SamplingParams
from fairkv_jax.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_NOT_FINITE = (
    "the model's logits are not finite numbers: its weights are damaged, or its values exceed the "
    "range of its data type (see dtype)"
)


class OutputProcessor:
    """Keeps the outputs of all unfinished requests and appends new tokens to them.

    It detokenizes incrementally, advances grammars, applies stop conditions, and builds the
    cumulative `RequestOutput`s.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._states: dict[str, RequestState] = {}

    def add(
        self,
        request: Request,
        *,
        max_tokens: int,
        arrival_time: float,
        matcher: GrammarMatcher | None = None,
    ) -> None:
        """Begins an empty output; `arrival_time` is in `time.monotonic` seconds."""
        metrics = RequestMetrics(arrival_time)
        state = RequestState(request, self._tokenizer, max_tokens, metrics, matcher)
        self._states[request.request_id] = state

    def abort(self, request_id: str) -> None:
        """Forgets an output. Unknown ids are ignored."""
        self._states.pop(request_id, None)

    def started(self, request_id: str, now: float) -> None:
        """Notes when a request's prefill began; after a preemption the first time counts."""
        state = self._states.get(request_id)
        if state is not None and state.metrics.first_scheduled_time is None:
            state.metrics.first_scheduled_time = now

    def grammar_bitmask(self, request_id: str) -> np.ndarray:
        """[W] words of the tokens that may come next in an output that follows a grammar."""
        matcher = self._states[request_id].matcher
        assert matcher is not None
        return matcher.bitmask()

    @property
    def token_ids(self) -> dict[str, list[int]]:
        """The generated tokens of every unfinished request."""
        return {request_id: state.token_ids for request_id, state in self._states.items()}

    def process(self, new_tokens: Sequence[NewTokens], now: float) -> list[RequestOutput]:
        """Appends new tokens to their outputs and returns the outputs that have changed.

        Tokens after the end of an output are dropped; finished outputs are forgotten. `now` is
        the time in `time.monotonic` seconds.
        """
        outputs = []
        for new in new_tokens:
            state = self._states.get(new.request_id)
            if state is None:
                continue  # it was aborted after its tokens had been computed
            self._append(state, new, now)
            outputs.append(state.output())
        for output in outputs:
            if output.finished:
                del self._states[output.request_id]
        return outputs

    def _append(self, state: "RequestState", new: NewTokens, now: float) -> None:
        if new.prefill is not None:
            state.kept = new.prefill.kept
            state.num_cached_tokens = new.num_cached_tokens
            scores = new.prefill.prompt_logprobs
            if scores is not None and not np.isfinite(scores.top_logprobs[..., 0]).all():
                state.fail(_NOT_FINITE)
            elif state.params.prompt_logprobs is not None:
                state.prompt_logprobs = self._prompt_logprobs(state, scores)
            if new.sampled is None and state.error is None:
                state.end_with_prompt(now)
        count = state.params.logprobs
        for step in new.steps:
            assert new.sampled is not None
            if state.finish_reason is not None:
                break
            if new.sampled.tokens[step, new.row] == NO_TOKEN:
                state.fail(_NOT_FINITE)
                break
            logprobs = None
            if count is not None:
                logprobs = self._ranked(new.sampled, (step, new.row), count)
            state.append(int(new.sampled.tokens[step, new.row]), logprobs, now)
        if state.error is not None:
            log.error("request %s failed: %s", new.request_id, state.error)
        elif state.finish_reason == "error":
            log.warning(
                "request %s ends early: its grammar needs more work than the limit",
                new.request_id,
            )

    def _prompt_logprobs(
        self, state: "RequestState", scores: SampledTokens | None
    ) -> list[dict[int, Logprob] | None]:
        """For each token of the prompt; a prompt of one token has no scores."""
        if scores is None:
            return [None]
        count = state.params.prompt_logprobs or 0
        return [None, *(self._ranked(scores, (i, 0), count) for i in range(len(scores.tokens)))]

    def _ranked(
        self, sampled: SampledTokens, at: tuple[int, int], count: int
    ) -> dict[int, Logprob]:
        """The sampled token at (step, row), and the `count` most likely ones in its place."""
        chosen = float(sampled.logprob[at]), int(sampled.rank[at])
        ranked = {int(sampled.tokens[at]): chosen}
        for index in range(count):
            likely = int(sampled.top_tokens[at][index])
            ranked.setdefault(likely, (float(sampled.top_logprobs[at][index]), index + 1))
        text = self._tokenizer.token_text
        return {token: Logprob(value, rank, text(token)) for token, (value, rank) in ranked.items()}


class RequestState:
    """The output of one request so far."""

    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer,
        max_tokens: int,
        metrics: RequestMetrics,
        matcher: GrammarMatcher | None,
    ):
        self.request = request
        self.metrics = metrics
        self.token_ids: list[int] = []
        self.kept: KeptTokens | None = None
        self.num_cached_tokens: int | None = None
        self.matcher = matcher
        """The state of its grammar; None: any token may be generated."""
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        self.finish_reason: str | None = None
        self.error: str | None = None
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

    def end_with_prompt(self, now: float) -> None:
        """Ends an output that was to have no tokens."""
        self.metrics.prefill_finished_time = now
        self._finish("length", None)

    def fail(self, error: str) -> None:
        """Ends an output that cannot be continued."""
        self.finish_reason, self.error = "error", error

    def append(self, token_id: int, logprobs: dict[int, Logprob] | None, now: float) -> None:
        """Appends a sampled token, and ends the output where a stop condition holds."""
        self.token_ids.append(token_id)
        self.metrics.last_token_time = now
        if self.metrics.prefill_finished_time is None:
            self.metrics.prefill_finished_time = now
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
        """The output so far; text that may become a stop string is held back."""
        shown = len(self._text)
        if self.finish_reason is None:
            shown -= _num_held_back(self._text, self._stop_strings)
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
            metrics=replace(self.metrics),
            num_cached_tokens=self.num_cached_tokens,
            error=self.error,
        )

    @property
    def _stop_strings(self) -> tuple[str, ...]:
        return tuple(self.params.stop or ())

    def _finish(self, reason: str, stop_reason: int | str | None) -> None:
        self.finish_reason, self._stop_reason = reason, stop_reason
        searched = len(self._text)
        self._text += self._detokenizer.flush()
        if reason == "length":
            self._stop_at_string(searched)

    def _stop_at_string(self, searched: int) -> None:
        """Ends at the first stop string that the text after `searched` completes."""
        if len(self.token_ids) <= self.params.min_tokens:
            return
        found = [
            (self._text.find(stop, max(0, searched - len(stop) + 1)), stop)
            for stop in self._stop_strings
        ]
        found = [(at, stop) for at, stop in found if at >= 0]
        if not found:
            return
        at, stop = min(found)
        if self.params.include_stop_str_in_output:
            at += len(stop)
        self._text = self._text[:at]
        self.finish_reason, self._stop_reason = "stop", stop


def answer_token_ids(output: CompletionOutput, eos_token_ids: Collection[int]) -> list[int]:
    """Returns the tokens of a finished output that its text shows.

    Those that end it are left out; an output that a stop string has ended counts as empty, since
    its tokens are not those of the text.
    """
    if isinstance(output.stop_reason, str) or not output.token_ids:
        return []
    *before, last = output.token_ids
    ends = output.finish_reason == "stop" and (last in eos_token_ids or last == output.stop_reason)
    return before if ends else output.token_ids


def _num_held_back(text: str, stops: tuple[str, ...]) -> int:
    """Characters at the end of the text that may yet become a stop string."""
    return max(
        (
            size
            for stop in stops
            for size in range(1, min(len(stop) - 1, len(text)) + 1)
            if stop.startswith(text[-size:])
        ),
        default=0,
    )
