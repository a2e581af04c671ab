"""Gives requests rows of the batch with the pages that they need, and takes both back."""

from collections.abc import Sequence

import numpy as np

from fairkv_jax.engine.decode_compression import DecodeCompression
from fairkv_jax.engine.kv_cache_manager import KVCacheManager
from fairkv_jax.engine.page_tables import PageCopies
from fairkv_jax.engine.prefix_cache import Prefix, PrefixCache
from fairkv_jax.engine.prefix_pages import PrefixPages
from fairkv_jax.engine.scheduled_request import ScheduledRequest
from fairkv_jax.engine.scheduler_output import Fork, Insertion, RowPrefix


class Rows:
    """The rows of the batch; prefixes that no request uses make room for what is asked for.

    Methods that take `is_alone` are told whether no request runs. Then every prefix may go: there
    is room for one whole row in any case.
    """

    def __init__(
        self,
        kv_cache: KVCacheManager,
        prefixes: PrefixCache,
        compression: DecodeCompression | None = None,
    ):
        self._kv_cache, self._prefixes = kv_cache, prefixes
        self._compression = compression
        self._free = list(range(kv_cache.spec.num_rows))

    @property
    def has_free(self) -> bool:
        return bool(self._free)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def can_take(self, request: ScheduledRequest) -> bool:
        """Whether there is a row for a request, which may hold one already."""
        return request.shared_row is not None or self.has_free

    def insert(self, request: ScheduledRequest, *, is_alone: bool) -> Insertion | None:
        """Gives pages to what is kept of a segment, after what comes before; None if they lack.

        The last segment of a prompt makes its row active; another becomes a prefix.
        """
        segment, kept, known = request.segment, request.head_lengths, request.output_token_ids
        assert segment is not None
        assert kept is not None
        prompt_lengths = kept + request.prefix_lengths
        num_known = self._num_known(request, prompt_lengths)
        row, reserve = request.shared_row, self._kv_cache.reserve_suffix
        if row is None:
            row, reserve = min(self._free), self._kv_cache.reserve_prompt  # the batch stays short
        lengths = self._prefixes.evict_until(
            lambda: reserve(row, kept, num_known), any_prefix=is_alone
        )
        if lengths is None:
            return None
        if request.shared_row is None:
            self._free.remove(row)
        is_last = segment.prefix is None
        if segment.prefix is None:
            request.shared_row = None
            self._activate(request, row, prompt_lengths)
        else:
            request.shared_row = row  # until what is written there can be shared
            self._use(request, segment.prefix)
            self._prefixes.retain(segment.prefix, row)
        request.next_segment += 1
        request.chunks_scheduled = request.num_cached = 0
        request.head_lengths = request.packed_work = None
        return Insertion(request.request_id, row, lengths, list(known), is_last)

    def fork(self, request: ScheduledRequest, *, is_alone: bool) -> Insertion | None:
        """Lets a row begin with the pages of the request's whole prompt; None if pages lack."""
        prompt = request.whole_prompt
        assert prompt is not None
        assert prompt.head_lengths is not None
        num_next = 1 + self._num_known(request, prompt.head_lengths)
        shared = self._share(prompt, is_alone=is_alone, num_next_tokens=num_next)
        if shared is None:
            return None
        row, pages, copies = shared
        self.leave_group(request)
        self._activate(request, row, prompt.head_lengths)
        request.next_segment = len(request.segments)
        request.chunks_scheduled = request.num_cached = 0
        known = list(request.output_token_ids)
        fork = Fork(request.request, copies)
        return Insertion(request.request_id, row, pages.slot_lengths, known, fork=fork)

    def share_prompt(self, row: int, requests: Sequence[ScheduledRequest]) -> None:
        """Keeps what a row holds for requests that have the same whole prompt."""
        for request in requests:
            if request.whole_prompt is not None:
                self._prefixes.use(request.whole_prompt, request.request_id)
                self._prefixes.retain(request.whole_prompt, row)

    def leave_group(self, request: ScheduledRequest) -> None:
        """Notes that a request no longer waits for the whole prompt that it shares."""
        if request.whole_prompt is not None:
            self._prefixes.leave(request.whole_prompt, request.request_id)

    def find_prefix(self, request: ScheduledRequest) -> None:
        """Lets a request go on after the longest of its prefixes that is cached."""
        self._leave_row(request)
        found = [
            (index, segment.prefix)
            for index, segment in enumerate(request.segments, 1)
            if segment.prefix is not None and segment.prefix.pages is not None
        ]
        if found:
            request.next_segment, prefix = found[-1]
            self._use(request, prefix)
        else:
            request.next_segment = 0
            self._leave_prefix(request)
        if request.num_cached_tokens is None:
            request.num_cached_tokens = 0 if request.prefix is None else request.prefix.num_tokens

    def share(self, request: ScheduledRequest, *, is_alone: bool) -> bool:
        """Lets a row begin with the prefix of a request; False if pages lack."""
        prefix = request.prefix
        assert prefix is not None
        shared = self._share(prefix, is_alone=is_alone)
        if shared is None:
            return False
        row, pages, copies = shared
        request.shared_row = row
        tokens = request.request.prompt_token_ids[: prefix.num_tokens]
        request.row_prefix = RowPrefix(row, tokens, pages.slot_lengths, copies)
        return True

    def start_over(self, request: ScheduledRequest) -> None:
        """Takes back what a waiting request holds, and gives its prefill up."""
        self._leave_row(request)
        self._leave_prefix(request)
        request.attempt += 1
        request.next_segment = request.chunks_scheduled = request.num_cached = 0
        request.head_lengths = request.packed_work = None

    def release(self, row: int, request: ScheduledRequest) -> None:
        """Takes back the row in which a request runs."""
        self._kv_cache.free(row)
        self._free.append(row)
        self._leave_prefix(request)

    def _share(
        self, prefix: Prefix, *, is_alone: bool, num_next_tokens: int = 0
    ) -> tuple[int, PrefixPages, PageCopies] | None:
        """Takes a row that begins with a prefix; None if pages lack."""
        assert prefix.pages is not None
        row = min(self._free)

        def share(*, copies_last: bool = True) -> tuple[int, PrefixPages, PageCopies] | None:
            pages = self._kv_cache.routed(prefix.places)
            copies = self._kv_cache.share(
                row, pages, copies_last=copies_last, num_next_tokens=num_next_tokens
            )
            return None if copies is None else (row, pages, copies)

        shared = self._prefixes.replicate(prefix, share)
        if shared is None:
            shared = self._prefixes.evict_until(share)
        if shared is None and is_alone:
            shared = share(copies_last=False)
            self._prefixes.evict(prefix)
        if shared is not None:
            self._free.remove(row)
        return shared

    def _num_known(self, request: ScheduledRequest, prompt_lengths: np.ndarray) -> int:
        """Returns how many known tokens a row appends to its prompt before it is compressed."""
        num_known = len(request.output_token_ids)
        if self._compression is None:
            return num_known
        return min(num_known, self._compression.first_at(prompt_lengths))

    def _activate(self, request: ScheduledRequest, row: int, prompt_lengths: np.ndarray) -> None:
        """Lets a row decode whose heads hold so many tokens of a request's prompt, [L, K]."""
        self._kv_cache.activate(row)
        if self._compression is not None:
            request.next_compression = self._compression.first_at(prompt_lengths)
            request.is_being_compressed = False
            shared = prompt_lengths if request.whole_prompt is not None else request.prefix_lengths
            request.fixed_lengths = np.zeros_like(prompt_lengths) + shared
            request.is_compressed = False

    def _leave_row(self, request: ScheduledRequest) -> None:
        if request.shared_row is not None:
            self._kv_cache.free(request.shared_row)
            self._free.append(request.shared_row)
            request.shared_row = request.row_prefix = None

    def _use(self, request: ScheduledRequest, prefix: Prefix) -> None:
        """Lets a prefix remain in the cache until its request has ended or starts over."""
        if request.prefix is not prefix:
            self._leave_prefix(request)
            request.prefix = prefix
        self._prefixes.use(prefix, request.request_id)

    def _leave_prefix(self, request: ScheduledRequest) -> None:
        if request.prefix is not None:
            self._prefixes.leave(request.prefix, request.request_id)
            request.prefix = None
