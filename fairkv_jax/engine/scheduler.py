"""Decides what every execution does: prefill, decode, and which requests are preempted.

It is host code without JAX, a clock or a queue of its own, so that the same calls give the same
decisions. What only the devices know, sampled tokens and what is kept of a prompt, arrives by
`update`; how fast they are is an argument of `schedule`.
"""

from bisect import insort
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fairkv_jax.engine.decode_compression import DecodeCompression
from fairkv_jax.engine.kv_cache_manager import KVCacheManager
from fairkv_jax.engine.prefill_chunking import Packing
from fairkv_jax.engine.prefix_cache import Prefix, PrefixCache
from fairkv_jax.engine.rows import Rows
from fairkv_jax.engine.scheduled_request import ScheduledRequest
from fairkv_jax.engine.scheduler_output import (
    Decode,
    DecodeRow,
    ExecutionResult,
    Insertion,
    KeptTokens,
    NewTokens,
    PrefillChunks,
    PrefillResult,
    RowCompression,
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


@dataclass(frozen=True)
class _InFlight:
    """A scheduled output whose result is not known yet, and the requests that it serves."""

    output: SchedulerOutput
    prefill: tuple[ScheduledRequest, int] | None
    """The request and its attempt."""
    rows: dict[int, ScheduledRequest]
    peers: tuple[ScheduledRequest, ...] = ()
    """Requests with the same prompt, in the order of `PrefillChunks.also_samples`."""
    packed: tuple[tuple[ScheduledRequest, int], ...] = ()
    """Requests whose prompts are packed behind that of `prefill`, each with its attempt."""


class Scheduler:
    """First come, first served; under pressure the newest request gives way to the older ones.

    One prompt at a time is prefilled, that of the oldest waiting request, while a row is free.
    While other requests decode, its chunks take about as long as one or two decode steps between
    two steps. A request whose prefill is done and that waits for pages delays no running request.
    When pages run out, prefixes that no request uses are evicted; then the newest request is
    preempted: its prompt is prefilled again later, and its tokens are replayed.

    Short prompts that are kept whole are packed: those of the requests next in the queue are
    prefilled in the same chunks, as many as fit and as there are rows for.

    A prompt of several segments is prefilled one after the other, from the longest prefix on that
    is cached. A segment that follows another is prefilled in a row that begins with what is kept
    before it, as are the tokens that it keeps itself.

    Rows that share a prefix use the same pages, and so the same devices, unless that would overload
    one: then heads of the prefix are copied to their other replicas, in pages that are free.

    Of requests with the same `whole_prompt`, one is prefilled. The first tokens of all are sampled
    at its end; when it gets its row, the others share its pages, one after the other.

    With a `DecodeCompression`, rows are compressed again while they decode, at token counts that
    follow from the request. How much their heads keep is known with the execution's result; until
    then, a row counts as if nothing had been dropped.
    """

    def __init__(
        self,
        kv_cache: KVCacheManager,
        grammar_bitmask: Callable[[str], np.ndarray],
        prefix_cache_fraction: float = 1.0,
        decode_compression: DecodeCompression | None = None,
        packing: Packing | None = None,
    ):
        """`grammar_bitmask` gives the tokens that may come next in a request's output."""
        self.kv_cache = kv_cache
        self.prefixes = PrefixCache(kv_cache, prefix_cache_fraction)
        self.waiting: list[ScheduledRequest] = []
        """In the order of their arrival; only the first may have a prefill."""
        self.running: dict[int, ScheduledRequest] = {}
        """By row."""
        self.num_preemptions = 0
        self._grammar_bitmask = grammar_bitmask
        self._compression = decode_compression
        self.packing = packing
        """None: no prompts are packed."""
        self._packed: tuple[tuple[ScheduledRequest, int], ...] = ()
        """Requests whose prompts are packed in the prefill under way, each with its attempt."""
        self._rows = Rows(kv_cache, self.prefixes, decode_compression)
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
        return self._rows.has_free

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
            mine = [each for each in self.waiting if each.request_id == request_id]
            if not mine:
                return
            for request in mine:
                self.waiting.remove(request)
                self._rows.start_over(request)
                self._rows.leave_group(request)
        self._finished.append(request_id)

    def retain(self, request_id: str, prefix: Prefix) -> None:
        """Keeps the beginning of what a running request has in the cache as a prefix.

        It ends behind the last tokens that were compressed, and before the last one generated.
        Nothing is kept of a row that was compressed while it decoded: a prompt with these tokens
        would keep others.
        """
        row = self.row_of(request_id)
        if row is None or prefix.is_unwanted or self.running[row].is_compressed:
            return
        request = self.running[row]
        num_tokens = len(request.request.prompt_token_ids) + request.num_cached
        self.prefixes.retain(prefix, row, num_tokens - prefix.num_tokens)

    def schedule(self, timings: Timings) -> SchedulerOutput | None:
        """The next execution; None where the results of earlier ones must come first.

        Everything that it decides counts as done: further calls build on it.
        """
        if not len(self) or self._must_wait():
            return None
        insertion, more_insertions = self._insert(), []
        while insertion is not None and self.waiting and self.waiting[0].is_prefilled:
            another = self._insert()  # it was packed with the first
            if another is None:
                break
            more_insertions.append(another)
        for_insertion = self.prefixes.take_replications()
        inserts_prefix = insertion is not None and not insertion.is_last
        # A prefix is shared only after it has been written, by the next output.
        request = None if inserts_prefix else self._next_to_prefill()
        for_prefill = self.prefixes.take_replications()
        attempt = 0 if request is None else request.attempt
        is_awaited = inserts_prefix or request is not None or self._prefill_is_in_flight
        decode, preempted = self._decode(timings, one_step=is_awaited)
        compressions = () if decode is None else self._compress(decode)
        prefill = None
        if request is not None and (self.waiting[0], request.attempt) == (request, attempt):
            prefill = self._prefill(timings, request)  # decoding has not taken its pages
        if insertion is None and prefill is None and decode is None:
            assert not for_insertion
            assert not for_prefill
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
            compressions=compressions,
            replications_before_insertion=for_insertion,
            replications_before_prefill=for_prefill,
            more_insertions=tuple(more_insertions),
        )
        self._index += 1
        self._finished, self._released, self._resets_cache = [], [], False
        chunks, peers, packed = None, (), ()
        if prefill is not None and request is not None:
            chunks = request, attempt
            peers = tuple(self._peers(request)) if prefill.also_samples else ()
            packed = self._packed
        rows = dict(self.running) if decode is not None else {}
        self._in_flight.append(_InFlight(output, chunks, rows, peers, packed))
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
                new += self._prefilled(request, result, scheduled)
        self._record_compressions(scheduled, result)
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

    def take_cached(self) -> list[NewTokens]:
        """Returns the requests of which nothing is left to do, since they only compute a prefix.

        They remain until they are aborted.
        """
        new = []
        for request in self.waiting:
            prefix = request.segments[-1].prefix
            if prefix is None or prefix.pages is None:
                continue
            assert prefix.head_lengths is not None
            cached = request.num_cached_tokens
            cached = prefix.num_tokens if cached is None else cached
            kept = PrefillResult(KeptTokens(prefix.head_lengths, None), None, None)
            new.append(NewTokens(request.request_id, None, 0, range(0), kept, cached))
        return new

    def reset(self, output_token_ids: Mapping[str, list[int]]) -> None:
        """Puts all requests back into the queue, after the devices have lost the cache.

        `output_token_ids` are the tokens that have been handed out: nothing else counts. Requests
        that it lacks have ended.
        """
        self._in_flight.clear()
        for row in list(self.running):
            self._wait(self._release(row))
        for request in self.waiting:
            self._rows.start_over(request)
            self._rows.leave_group(request)
        self.prefixes.clear()
        self.prefixes.take_replications()
        self.waiting = [each for each in self.waiting if each.request_id in output_token_ids]
        for request in self.waiting:
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

    def _must_wait(self) -> bool:
        """Whether the next decision needs results that have not arrived.

        This is so if a request may have all its tokens, if a grammar needs the last token, if a row
        is to be compressed while an earlier compression is in flight, or if finished requests may
        free pages. While no request decodes, only one execution is in flight.
        """
        if not self._in_flight:
            return False
        running = self.running.values()
        if not running:
            return True
        if any(request.num_remaining_steps == 0 or request.follows_grammar for request in running):
            return True
        if any(request.is_being_compressed and request.is_to_be_compressed for request in running):
            return True
        return not self.kv_cache.can_reserve(1) and not self.prefixes.has_unused

    def _insert(self) -> Insertion | None:
        """Gives the first waiting request a row, if its prefill is done and pages suffice.

        The prompt's last segment lets it run; others become prefixes.
        """
        request = self.waiting[0] if self.waiting else None
        if request is None or not self._rows.can_take(request):
            return None
        if request.can_fork:
            insertion = self._rows.fork(request, is_alone=not self.running)
        elif request.head_lengths is not None:
            insertion = self._rows.insert(request, is_alone=not self.running)
        else:
            return None
        if insertion is not None and insertion.is_last:
            self.running[insertion.row] = self.waiting.pop(0)
            if insertion.fork is None:
                self._rows.share_prompt(insertion.row, self._peers(request))
        return insertion

    def _peers(self, request: ScheduledRequest) -> list[ScheduledRequest]:
        """The waiting requests that share the whole prompt of a request, without itself."""
        prompt = request.whole_prompt
        if prompt is None:
            return []
        waiting = (each for each in self.waiting if each is not request)
        return [each for each in waiting if each.whole_prompt is prompt]

    @property
    def _prefill_is_in_flight(self) -> bool:
        """Whether all chunks of a prompt are scheduled, and their result is not known yet."""
        request = self.waiting[0] if self.waiting else None
        if request is None or request.head_lengths is not None or not self._rows.can_take(request):
            return False
        return 0 < request.chunks_scheduled == request.num_chunks

    def _next_to_prefill(self) -> ScheduledRequest | None:
        """Returns the request whose chunks are scheduled next, with the row that they need.

        None where no request waits for chunks, or no row or too few pages are free.
        """
        request = self.waiting[0] if self.waiting else None
        if request is None or request.can_fork or not self._rows.can_take(request):
            return None
        if request.chunks_scheduled == 0:
            self._rows.find_prefix(request)
            has_prefix = request.segment is not None and request.prefix is not None
            if has_prefix and not self._rows.share(request, is_alone=not self.running):
                return None
        return request if request.chunks_scheduled < request.num_chunks else None

    def _decode(self, timings: Timings, *, one_step: bool) -> tuple[Decode | None, tuple[str, ...]]:
        """Schedules decode steps of all rows; also returns the requests preempted to make room."""
        if not self.running:
            return None, ()
        preempted = []
        num_steps = 1
        if not one_step and not any(each.follows_grammar for each in self.running.values()):
            left = min(map(self._num_uninterrupted_steps, self.running.values()))
            num_steps = max(1, min(left, _steps_at_once(timings)))
        if not self.kv_cache.can_reserve(num_steps):
            num_steps = 1
        while not self.kv_cache.reserve(num_steps):
            preempted += self._make_room()
        self.num_preemptions += len(preempted)
        rows, bitmasks = [], {}
        for row, request in sorted(self.running.items()):
            position = len(request.request.prompt_token_ids) + request.num_cached
            rows.append(DecodeRow(row, request.request_id, position, request.num_cached + 1))
            request.num_cached += num_steps
            if request.follows_grammar:
                bitmasks[row] = self._grammar_bitmask(request.request_id)
        return Decode(tuple(rows), num_steps, bitmasks), tuple(preempted)

    def _num_uninterrupted_steps(self, request: ScheduledRequest) -> int:
        """Returns the decode steps before a request ends or its row is compressed again."""
        left = request.num_remaining_steps
        if self._compression is None or request.next_compression is None:
            return left
        steps = request.next_compression - request.num_cached
        return min(left, steps or self._compression.interval)

    def _compress(self, decode: Decode) -> tuple[RowCompression, ...]:
        """Schedules the compression of rows that are due, before the steps of `decode`."""
        due, compression = [], self._compression
        for at in decode.rows:
            request, num_cached = self.running[at.row], at.output_index - 1
            if compression is None or request.next_compression != num_cached:
                continue
            fixed, lengths = request.fixed_lengths, self.kv_cache.lengths[:, at.row]
            assert fixed is not None
            due.append(
                RowCompression(
                    at.row,
                    request.request_id,
                    at.position - 1,
                    int(lengths.max()) - decode.num_steps,
                    compression.budgets(fixed),
                    fixed,
                )
            )
            request.next_compression = num_cached + compression.interval
            request.is_being_compressed = request.is_compressed = True
        return tuple(due)

    def _record_compressions(self, scheduled: _InFlight, result: ExecutionResult) -> None:
        """Frees the pages that rows do not need since they have been compressed."""
        done = zip(scheduled.output.compressions, result.compressed_lengths, strict=True)
        for compression, head_lengths in done:
            request = scheduled.rows[compression.row]
            if self.running.get(compression.row) is request:
                self.kv_cache.shrink(compression.row, head_lengths)
                request.is_being_compressed = False

    def _make_room(self) -> list[str]:
        """Takes pages from prefixes, else from the newest request that has any.

        Returns the ids of running requests that have been preempted.
        """
        if self.prefixes.evict_unused():
            return []
        first = self.waiting[0] if self.waiting else None
        row = max(self.running, key=lambda row: self.running[row].arrival)
        newest = self.running[row]
        if first is not None and (first.shared_row is not None or first.prefix is not None):
            if len(self.running) == 1 or first.arrival > newest.arrival:
                self._rows.start_over(first)
                return []
        elif len(self.running) == 1:
            # There is room for one whole row in any case, if prefixes give up their last pages.
            has_evicted = self.prefixes.evict_any()
            assert has_evicted, "the cache cannot hold one request of full length"
            return []
        self._wait(self._release(row))
        return [newest.request_id]

    def _prefill(self, timings: Timings, request: ScheduledRequest) -> PrefillChunks:
        """Schedules the next chunks of the first waiting request; fewer while others decode."""
        segment, start = request.segment, request.chunks_scheduled
        assert segment is not None
        if start == 0:
            self._packed = self._pack(request)
        work = segment.chunk_work if request.packed_work is None else request.packed_work
        seconds = _PREFILL_SECONDS
        if self.running:
            seconds = _STALL_STEPS * (timings.step_seconds or 0.0)
        done = np.cumsum(work[start : request.num_chunks])
        granted = seconds * (timings.prefill_work_per_second or 0.0)
        count = max(1, int(np.searchsorted(done, granted, side="right")))
        stop = request.chunks_scheduled = start + count
        samples = segment.prefix is None and request.max_tokens > 0 and not request.output_token_ids
        is_last = stop == request.num_chunks
        bitmask = None
        if is_last and samples and request.follows_grammar:
            bitmask = self._grammar_bitmask(request.request_id)
        others = self._peers(request) if is_last and samples else []
        packed = [each for each, _ in self._packed] if start == 0 else []
        row_prefix, request.row_prefix = request.row_prefix, None
        return PrefillChunks(
            request.request_id,
            start,
            stop,
            request.num_chunks,
            work=float(done[count - 1]),
            new_request=request.for_runner(segment) if start == 0 else None,
            cached_prefix=row_prefix,
            samples_token=is_last and samples,
            grammar_bitmask=bitmask,
            also_samples=tuple(replace(each.request, prompt_token_ids=[]) for each in others),
            packed=tuple(each.for_runner(each.segments[0]) for each in packed),
        )

    def _pack(self, request: ScheduledRequest) -> tuple[tuple[ScheduledRequest, int], ...]:
        """Chooses the waiting requests whose prompts are packed behind that of the first.

        A new prefill takes the place of what earlier ones have left for rows.
        """
        others, packing = self.waiting[1:], self.packing
        for each in others:
            if each.is_prefilled:
                self._rows.start_over(each)
        if packing is None or not request.can_be_packed:
            return ()
        chosen, num_tokens = [], len(request.request.prompt_token_ids)
        for each in others[: min(packing.max_prompts, self._rows.num_free) - 1]:
            more = len(each.request.prompt_token_ids)
            if not each.can_be_packed or num_tokens + more > packing.max_tokens:
                break
            self._rows.find_prefix(each)
            chosen.append((each, each.attempt))
            num_tokens += more
        if chosen:
            request.packed_work = packing.work(num_tokens)
        return tuple(chosen)

    def _prefilled(
        self, request: ScheduledRequest, result: ExecutionResult, scheduled: _InFlight
    ) -> list[NewTokens]:
        """Records that a segment's prefill is done, and the first tokens if any were sampled."""
        prefill, segment = result.prefill, request.segment
        assert prefill is not None
        assert segment is not None
        if scheduled.packed:
            return self._packed_prefilled(request, prefill, scheduled.packed)
        request.head_lengths = prefill.kept.lengths
        if segment.prefix is not None or request.output_token_ids:
            return []  # more follows; or it was preempted: its first token is known
        first = prefill.first_token
        steps = range(0 if first is None else 1)
        kept = prefill.kept.lengths + request.prefix_lengths
        prefill = replace(prefill, kept=replace(prefill.kept, lengths=kept))
        cached, new = request.num_cached_tokens or 0, []
        for place, each in enumerate((request, *scheduled.peers)):
            if each.output_token_ids or each not in self.waiting:
                continue  # it has ended meanwhile
            if first is not None:
                each.output_token_ids.append(int(first.tokens[0, place]))
            new.append(NewTokens(each.request_id, first, place, steps, prefill, cached))
        return new

    def _packed_prefilled(
        self,
        request: ScheduledRequest,
        prefill: PrefillResult,
        packed: Sequence[tuple[ScheduledRequest, int]],
    ) -> list[NewTokens]:
        """Records the first tokens of packed prompts, which are kept whole."""
        first, new = prefill.first_token, []
        assert first is not None
        for place, (each, attempt) in enumerate([(request, request.attempt), *packed]):
            if each.attempt != attempt or each not in self.waiting:
                continue  # it has ended or given its prefill up
            num_tokens = len(each.request.prompt_token_ids)
            each.head_lengths = np.full_like(prefill.kept.lengths, num_tokens)
            each.chunks_scheduled = each.num_chunks
            each.output_token_ids.append(int(first.tokens[0, place]))
            kept = replace(prefill, kept=KeptTokens(each.head_lengths, None))
            new.append(NewTokens(each.request_id, first, place, range(1), kept))
        return new

    def _wait(self, request: ScheduledRequest) -> None:
        """Puts a request into the queue. A request that is no longer first loses its prefill."""
        self._rows.start_over(request)
        first = self.waiting[0] if self.waiting else None
        insort(self.waiting, request, key=lambda each: each.arrival)
        if first is not None and first is not self.waiting[0]:
            self._rows.start_over(first)

    def _release(self, row: int) -> ScheduledRequest:
        """Takes a request off its row and frees its pages."""
        request = self.running.pop(row)
        self._rows.release(row, request)
        self._released.append(row)
        return request


def _steps_at_once(timings: Timings) -> int:
    """Returns how many decode steps one execution runs while no prompt is prefilled."""
    if not timings.step_seconds:
        return 1
    return max(1, min(MAX_DECODE_STEPS, int(_DISPATCH_SECONDS / timings.step_seconds)))
