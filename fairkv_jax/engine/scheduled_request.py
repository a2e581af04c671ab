"""A request as the scheduler sees it: the segments of its prompt, and how far it has come."""

from dataclasses import dataclass, field, replace

import numpy as np

from fairkv_jax.engine.prefix_cache import Prefix
from fairkv_jax.engine.scheduler_output import NewRequest, RowPrefix


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of a prompt that are prefilled, and compressed, together."""

    start: int
    stop: int
    """Tokens [start, stop) of the prompt."""
    chunk_work: np.ndarray
    """Multiply-adds of each chunk of its prefill."""
    num_cache_chunks: int
    """Chunks that its cache needs; the others are the log-probabilities of the prompt."""
    prefix: Prefix | None = None
    """The prefix that ends with it, if that is to be kept for other requests."""
    kv_policy: str | None = None
    """As in `NewRequest`; so are the following."""
    kv_budget: int | None = None
    kv_ratio: float | None = None
    keeps_whole: bool = False


@dataclass(eq=False)
class ScheduledRequest:
    """A request while it waits and runs."""

    request: NewRequest
    arrival: int
    max_tokens: int
    segments: tuple[Segment, ...]
    """All but the last have a prefix. If the last one has, the request only computes it."""
    follows_grammar: bool = False
    output_token_ids: list[int] = field(default_factory=list)
    """Known to the scheduler; they survive a preemption."""
    num_cached: int = 0
    """Generated tokens whose keys and values are in the cache, or will be when all that has been
    scheduled is done."""
    next_segment: int = 0
    """The segment that is prefilled, or will be."""
    chunks_scheduled: int = 0
    """Chunks of that segment that have been scheduled."""
    packed_work: np.ndarray | None = None
    """Multiply-adds of each chunk, where prompts of other requests are packed behind its own."""
    head_lengths: np.ndarray | None = None
    """[L, K] kept tokens of that segment, once its prefill is done and while the result has not
    been inserted."""
    prefix: Prefix | None = None
    """What its row begins with; while it is set, the prefix is in use."""
    shared_row: int | None = None
    """The row that holds the prefix while the segment after it is prefilled, or before."""
    row_prefix: RowPrefix | None = None
    """What that row begins with, until the runner is told with the segment's first chunk."""
    whole_prompt: Prefix | None = None
    """What its row holds before it decodes, shared with requests that have the same prompt."""
    num_cached_tokens: int | None = None
    """Prompt tokens whose compressed cache was there when its prefill began first."""
    next_compression: int | None = None
    """Generated tokens in the cache when its row is compressed next; None: it never is."""
    is_being_compressed: bool = False
    """Whether its row is compressed by an execution whose result is not known yet."""
    is_compressed: bool = False
    """Whether its row has been compressed since it began to decode."""
    fixed_lengths: np.ndarray | None = None
    """[L, K] first tokens of its row that stay, since other rows may share their pages."""
    attempt: int = 0
    """How often its prefill has been given up."""

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def segment(self) -> Segment | None:
        """The segment that is prefilled, or will be; None when all have been inserted."""
        return self.segments[self.next_segment] if self.next_segment < len(self.segments) else None

    @property
    def can_fork(self) -> bool:
        """Whether it needs no prefill, since the cache holds its prompt, and its token is known."""
        prompt = self.whole_prompt
        return prompt is not None and prompt.pages is not None and bool(self.output_token_ids)

    @property
    def num_chunks(self) -> int:
        """Chunks of its segment; log-probabilities that have been handed out are not repeated."""
        segment = self.segment
        if segment is None:
            return 0
        if self.packed_work is not None:
            return len(self.packed_work)
        return segment.num_cache_chunks if self.output_token_ids else len(segment.chunk_work)

    @property
    def is_prefilled(self) -> bool:
        """Whether its segment is prefilled and waits for a row."""
        return self.head_lengths is not None

    @property
    def can_be_packed(self) -> bool:
        """Whether its prompt may be packed with others: only prompts that are kept whole are."""
        segment, request = self.segments[0], self.request
        return (
            len(self.segments) == 1
            and segment.prefix is None
            and segment.keeps_whole
            and len(segment.chunk_work) == segment.num_cache_chunks
            and self.whole_prompt is None
            and not self.follows_grammar
            and not self.output_token_ids
            and self.max_tokens > 0
            and not request.return_kept_positions
        )

    @property
    def num_remaining_steps(self) -> int:
        """Decode steps until it has all the tokens that it may generate."""
        return self.max_tokens - self.num_cached - 1

    @property
    def is_to_be_compressed(self) -> bool:
        """Whether its row is compressed before its next decode step."""
        return self.next_compression == self.num_cached

    @property
    def prefix_lengths(self) -> np.ndarray | int:
        """[L, K] tokens that its prefix keeps; 0 without one."""
        if self.prefix is None:
            return 0
        assert self.prefix.head_lengths is not None
        return self.prefix.head_lengths

    def for_runner(self, segment: Segment) -> NewRequest:
        """Returns what the runner needs of a segment.

        Log-probabilities and positions are asked for with the last segment, and only once.
        """
        new, is_first_time = self.request, segment.prefix is None and not self.output_token_ids
        params = new.sampling_params
        return replace(
            new,
            prompt_token_ids=new.prompt_token_ids[segment.start : segment.stop],
            sampling_params=params if is_first_time else replace(params, prompt_logprobs=None),
            kv_policy=segment.kv_policy,
            kv_budget=segment.kv_budget,
            kv_ratio=segment.kv_ratio,
            keeps_whole=segment.keeps_whole,
            return_kept_positions=new.return_kept_positions and is_first_time,
        )
