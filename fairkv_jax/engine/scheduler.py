"""Decides what every execution does: prefill, decode, and which requests are preempted.

It is host code without JAX, a clock or a queue of its own, so that the same calls give the same
decisions. What only the devices know, sampled tokens and what is kept of a prompt, arrives by
`update`; how fast they are is an argument of `schedule`.
"""

from bisect import insort
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from fairkv_jax.engine.kv_cache_manager import KVCacheManager
from fairkv_jax.engine.scheduler_output import (
    Decode,
    DecodeRow,
    ExecutionResult,
    Insertion,
    NewRequest,
    NewTokens,
    PrefillChunks,
    SchedulerOutput,
)
from fairkv_jax.engine.timings import Timings
from fairkv_jax.shapes import MAX_DECODE_STEPS

_DISPATCH_SECONDS = 0.04
"""Time of the decode steps that are dispatched together; a new request may wait this long."""
_STALL_STEPS = 1.25
"""Time for chunks of a prefill between two decode steps, in decode steps."""
_PREFILL_SECONDS = 0.25
"""Time for chunks when no request decodes; a cancelled prefill may continue for this long."""


@dataclass(eq=False)
class ScheduledRequest:
    """A request while it waits and runs."""

    request: NewRequest
    arrival: int
    max_tokens: int
    chunk_work: np.ndarray
    """Multiply-adds of each chunk of its prefill."""
    num_layer_chunks: int
    """Chunks of the layers; the others are the prompt's log-probabilities."""
    follows_grammar: bool = False
    output_token_ids: list[int] = field(default_factory=list)
    """Known to the scheduler; they survive a preemption."""
    num_cached: int = 0
    """Generated tokens whose keys and values are in the cache, or will be when all that has been
    scheduled is done."""
    chunks_scheduled: int = 0
    head_lengths: np.ndarray | None = None
    """[L, K] kept tokens, once its prefill is done and while the result has not been inserted."""
    attempt: int = 0
    """How often its prefill has been given up."""

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def num_chunks(self) -> int:
        """Chunks of its prefill; log-probabilities that have been handed out are not repeated."""
        return self.num_layer_chunks if self.output_token_ids else len(self.chunk_work)

    @property
    def num_remaining_steps(self) -> int:
        """Decode steps until it has all the tokens that it may generate."""
        return self.max_tokens - self.num_cached - 1

    def start_over(self) -> None:
        """Forgets a prefill that is under way or done."""
        self.attempt += 1
        self.chunks_scheduled = 0
        self.head_lengths = None
        self.num_cached = 0


@dataclass(frozen=True)
class _InFlight:
    """A scheduled output whose result is not known yet, and the requests that it serves."""

    output: SchedulerOutput
    prefill: tuple[ScheduledRequest, int] | None
    """The request and its attempt."""
    rows: dict[int, ScheduledRequest]


class Scheduler:
    """First come, first served; under pressure the newest request gives way to the older ones.

    One prompt at a time is prefilled, that of the oldest waiting request, while a row is free.
    While other requests decode, its chunks take about as long as one or two decode steps between
    two steps. A request whose prefill is done and that waits for pages delays no running request.
    When pages run out, the newest request is preempted: its prompt is prefilled again later, and
    its tokens are replayed.
    """

    def __init__(
        self,
        kv_cache: KVCacheManager,
        grammar_bitmask: Callable[[str], np.ndarray],
    ):
        """`grammar_bitmask` gives the tokens that may come next in a request's output."""
        self.kv_cache = kv_cache
        self.waiting: list[ScheduledRequest] = []
        """In the order of their arrival; only the first may have a prefill."""
        self.running: dict[int, ScheduledRequest] = {}
        """By row."""
        self.num_preemptions = 0
        self._grammar_bitmask = grammar_bitmask
        self._free_rows = list(range(kv_cache.spec.num_rows))
        self._in_flight: deque[_InFlight] = deque()
        self._index = 0
        self._resets_cache = False
        self._released: list[int] = []
        self._finished: list[str] = []

    def __len__(self) -> int:
        """Requests that wait or run."""
        return len(self.waiting) + len(self.running)

    def __contains__(self, request_id: str) -> bool:
        return any(each.request_id == request_id for each in self._requests())

    @property
    def has_free_row(self) -> bool:
        return bool(self._free_rows)

    def row_of(self, request_id: str) -> int | None:
        """The row in which a request runs, if it does."""
        for row, request in self.running.items():
            if request.request_id == request_id:
                return row
        return None

    def add(self, request: ScheduledRequest) -> None:
        """Puts a request into the queue; its id is in use by no other."""
        self._wait(request)

    def abort(self, request_id: str) -> None:
        """Ends a request wherever it is; its pages are free at once. Unknown ids are ignored.

        Requests that have all their tokens end in the same way.
        """
        row = self.row_of(request_id)
        if row is not None:
            self._release(row)
        else:
            left = [each for each in self.waiting if each.request_id != request_id]
            if len(left) == len(self.waiting):
                return
            self.waiting = left
        self._finished.append(request_id)

    def schedule(self, timings: Timings) -> SchedulerOutput | None:
        """The next execution; None where the results of earlier ones must come first.

        Everything that it decides counts as done: further calls build on it.
        """
        if not len(self) or self._must_wait():
            return None
        insertion = self._insert()
        decode, preempted = self._decode(timings)
        prefill = self._prefill(timings) if self._wants_prefill else None
        if insertion is None and prefill is None and decode is None:
            return None
        output = SchedulerOutput(
            index=self._index,
            resets_cache=self._resets_cache,
            preempted_request_ids=preempted,
            finished_request_ids=tuple(self._finished),
            released_rows=tuple(self._released),
            page_table_update=self.kv_cache.take_page_table_update(),
            insertion=insertion,
            prefill=prefill,
            decode=decode,
        )
        self._index += 1
        self._finished, self._released, self._resets_cache = [], [], False
        first = self.waiting[0] if prefill is not None else None
        chunks = None if first is None else (first, first.attempt)
        rows = dict(self.running) if decode is not None else {}
        self._in_flight.append(_InFlight(output, chunks, rows))
        return output

    def update(self, output: SchedulerOutput, result: ExecutionResult) -> list[NewTokens]:
        """Records the result of the oldest scheduled output.

        Returns the tokens that are new. What was computed for a request that has ended since, or
        was known from before a preemption, is left out.
        """
        scheduled = self._in_flight.popleft()
        assert scheduled.output is output, "results come in the order of the outputs"
        new: list[NewTokens] = []
        if scheduled.prefill is not None and result.prefill is not None:
            request, attempt = scheduled.prefill
            if request.attempt == attempt and request in self.waiting:
                new += self._prefilled(request, result)
        if output.decode is not None and result.sampled is not None:
            tokens = result.sampled.tokens
            for at in output.decode.rows:
                request = scheduled.rows[at.row]
                if self.running.get(at.row) is not request:
                    continue
                self.kv_cache.commit(at.row, output.decode.num_steps)
                known = len(request.output_token_ids) - at.output_index
                steps = range(max(known, 0), output.decode.num_steps)
                request.output_token_ids += tokens[steps.start : steps.stop, at.row].tolist()
                if steps:
                    new.append(NewTokens(request.request_id, result.sampled, at.row, steps))
        return new

    def reset(self, output_token_ids: Mapping[str, list[int]]) -> None:
        """Puts all requests back into the queue, after the devices have lost the cache.

        `output_token_ids` are the tokens that have been handed out: nothing else counts. Requests
        that it lacks have ended.
        """
        self._in_flight.clear()
        for row in list(self.running):
            self._wait(self._release(row))
        self.waiting = [each for each in self.waiting if each.request_id in output_token_ids]
        for request in self.waiting:
            request.start_over()
            request.output_token_ids = list(output_token_ids[request.request_id])
        self.kv_cache.take_page_table_update()
        self._released = []
        self._resets_cache = True

    def forget_results(self) -> None:
        """Gives up the results of all scheduled outputs: no request is left that waits for them."""
        assert not len(self), "requests wait for results"
        self._in_flight.clear()

    def _requests(self) -> list[ScheduledRequest]:
        return [*self.waiting, *self.running.values()]

    @property
    def _wants_prefill(self) -> bool:
        """Whether the first waiting request has chunks left to be scheduled, and a row to go to."""
        if not self.waiting or not self.has_free_row:
            return False
        return self.waiting[0].chunks_scheduled < self.waiting[0].num_chunks

    def _must_wait(self) -> bool:
        """Whether the next decision needs results that have not arrived.

        This is so if a request may have all its tokens, if a grammar needs the last token, or if
        finished requests may free pages. While no request decodes, only one execution is in flight.
        """
        if not self._in_flight:
            return False
        running = self.running.values()
        if not running:
            return True
        if any(request.num_remaining_steps == 0 or request.follows_grammar for request in running):
            return True
        return not self.kv_cache.can_reserve(1)

    def _insert(self) -> Insertion | None:
        """Gives the first waiting request a row, if its prompt is there and pages suffice."""
        request = self.waiting[0] if self.waiting else None
        if request is None or request.head_lengths is None or not self.has_free_row:
            return None
        row = min(self._free_rows)  # the batch stays short
        lengths = self.kv_cache.reserve_prompt(
            row, request.head_lengths, len(request.output_token_ids)
        )
        if lengths is None:
            return None
        self._free_rows.remove(row)
        self.running[row] = self.waiting.pop(0)
        request.head_lengths = None
        request.num_cached = 0
        return Insertion(request.request_id, row, lengths, list(request.output_token_ids))

    @property
    def _prefill_is_under_way(self) -> bool:
        """Whether a request will take a free row as soon as its prefill is done."""
        return bool(self.waiting) and self.has_free_row and self.waiting[0].head_lengths is None

    def _decode(self, timings: Timings) -> tuple[Decode | None, tuple[str, ...]]:
        """Schedules decode steps of all rows; also returns the requests preempted to make room."""
        if not self.running:
            return None, ()
        preempted = []
        if self._prefill_is_under_way or any(
            request.follows_grammar for request in self.running.values()
        ):
            num_steps = 1
        else:
            left = min(request.num_remaining_steps for request in self.running.values())
            num_steps = max(1, min(left, _steps_at_once(timings)))
        if not self.kv_cache.can_reserve(num_steps):
            num_steps = 1
        while not self.kv_cache.reserve(num_steps):
            row = max(self.running, key=lambda row: self.running[row].arrival)
            request = self._release(row)
            preempted.append(request.request_id)
            self._wait(request)
        self.num_preemptions += len(preempted)
        rows, bitmasks = [], {}
        for row, request in sorted(self.running.items()):
            position = len(request.request.prompt_token_ids) + request.num_cached
            rows.append(DecodeRow(row, request.request_id, position, request.num_cached + 1))
            request.num_cached += num_steps
            if request.follows_grammar:
                bitmasks[row] = self._grammar_bitmask(request.request_id)
        return Decode(tuple(rows), num_steps, bitmasks), tuple(preempted)

    def _prefill(self, timings: Timings) -> PrefillChunks:
        """Schedules the next chunks of the first waiting request; fewer while others decode."""
        request = self.waiting[0]
        start = request.chunks_scheduled
        seconds = _PREFILL_SECONDS
        if self.running:
            seconds = _STALL_STEPS * (timings.step_seconds or 0.0)
        done = np.cumsum(request.chunk_work[start : request.num_chunks])
        granted = seconds * (timings.prefill_work_per_second or 0.0)
        count = max(1, int(np.searchsorted(done, granted, side="right")))
        stop = request.chunks_scheduled = start + count
        samples = request.max_tokens > 0 and not request.output_token_ids
        is_last = stop == request.num_chunks
        bitmask = None
        if is_last and samples and request.follows_grammar:
            bitmask = self._grammar_bitmask(request.request_id)
        return PrefillChunks(
            request.request_id,
            start,
            stop,
            request.num_chunks,
            work=float(done[count - 1]),
            new_request=self._new_request(request) if start == 0 else None,
            samples_token=is_last and samples,
            grammar_bitmask=bitmask,
        )

    def _new_request(self, request: ScheduledRequest) -> NewRequest:
        """The request as the runner needs it; a preempted one has been told of its prompt."""
        new = request.request
        if not request.output_token_ids:
            return new
        params = replace(new.sampling_params, prompt_logprobs=None)
        return replace(new, sampling_params=params, return_kept_positions=False)

    def _prefilled(self, request: ScheduledRequest, result: ExecutionResult) -> list[NewTokens]:
        """Records that a prompt's prefill is done, and its first token if one was sampled."""
        prefill = result.prefill
        assert prefill is not None
        request.head_lengths = prefill.kept.lengths
        if request.output_token_ids:
            return []  # it was preempted: its first token is known
        first = prefill.first_token
        if first is not None:
            request.output_token_ids.append(int(first.tokens[0, 0]))
        steps = range(0 if first is None else 1)
        return [NewTokens(request.request_id, first, 0, steps, prefill)]

    def _wait(self, request: ScheduledRequest) -> None:
        """Puts a request into the queue. A request that is no longer first loses its prefill."""
        request.start_over()
        first = self.waiting[0] if self.waiting else None
        insort(self.waiting, request, key=lambda each: each.arrival)
        if first is not None and first is not self.waiting[0]:
            first.start_over()

    def _release(self, row: int) -> ScheduledRequest:
        """Takes a request off its row and frees its pages."""
        self.kv_cache.free(row)
        self._free_rows.append(row)
        self._released.append(row)
        return self.running.pop(row)


def _steps_at_once(timings: Timings) -> int:
    """Returns how many decode steps one execution runs while no prompt is prefilled."""
    if not timings.step_seconds:
        return 1
    return max(1, min(MAX_DECODE_STEPS, int(_DISPATCH_SECONDS / timings.step_seconds)))
