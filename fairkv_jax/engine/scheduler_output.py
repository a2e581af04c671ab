"""What the scheduler decides and what it learns, as plain data without JAX.

A `SchedulerOutput` says all that one execution does. The same sequence of outputs gives the same
tokens on every process, so it can be logged, replayed and broadcast. An execution does its parts in
this order: it releases rows, writes page tables, inserts a compressed prompt, or a segment of one,
into a row, runs chunks of another prefill, compresses rows again, and decodes. Pages of prefixes
are copied to other devices before the insertion or before the prefill that reads them.
"""

from dataclasses import dataclass

import numpy as np

from fairkv_jax.engine.page_tables import PageCopies, PageReplication, PageTableUpdate
from fairkv_jax.sampling_params import SamplingParams


@dataclass(frozen=True)
class NewRequest:
    """A request as the model runner needs it."""

    request_id: str
    prompt_token_ids: list[int]
    """The whole prompt, or in `PrefillChunks` those of the segment that is prefilled."""
    sampling_params: SamplingParams
    seed: int
    kv_policy: str | None = None
    """Overrides the engine's policy; None: the engine's."""
    kv_budget: int | None = None
    return_kept_positions: bool = False
    kv_ratio: float | None = None
    keeps_whole: bool = False
    """Whether nothing is dropped, whatever the policy is."""


@dataclass(frozen=True)
class RowPrefix:
    """The beginning of a prompt, which a row of the KV cache holds."""

    row: int
    token_ids: list[int]
    """All tokens of the prefix, also those that compression has dropped."""
    slot_lengths: np.ndarray
    """[L, P*C] cached tokens of the slots that serve the row, 0 in the others."""
    page_copies: PageCopies | None = None
    """Pages to be copied first, which are the row's own."""


@dataclass(frozen=True)
class PrefillChunks:
    """Chunks [start, stop) of the `num_chunks` of a prompt's segment, see `PrefillChunking`."""

    request_id: str
    start: int
    stop: int
    num_chunks: int
    work: float
    """Approximate multiply-adds of these chunks."""
    new_request: NewRequest | None
    """Set with the first chunk, also when a preempted prompt is prefilled again."""
    cached_prefix: RowPrefix | None = None
    """With the first chunk: what precedes the segment in the cache, if anything does."""
    samples_token: bool = False
    """Whether the token that follows the prompt is to be sampled after the last chunk."""
    grammar_bitmask: np.ndarray | None = None
    """[W] words of the tokens that may be sampled then; None: all."""
    also_samples: tuple[NewRequest, ...] = ()
    """Requests with the same prompt, which is left out, whose token is sampled then as well."""
    packed: tuple[NewRequest, ...] = ()
    """With the first chunk: requests whose prompts are packed behind that of the new request, in
    the same chunks. All of them are kept whole, and all of their first tokens are sampled."""

    @property
    def is_last(self) -> bool:
        return self.stop == self.num_chunks


@dataclass(frozen=True)
class Fork:
    """A row that begins with the whole prompt of another row, whose pages it shares."""

    new_request: NewRequest
    """With the whole prompt."""
    page_copies: PageCopies
    """Pages to be copied first, which are the row's own."""


@dataclass(frozen=True)
class Insertion:
    """A compressed segment to be copied into a row of the cache, after what the row holds."""

    request_id: str
    row: int
    slot_lengths: np.ndarray
    """[L, P*C] tokens of the slots that serve the row afterwards, 0 in the others."""
    output_token_ids: list[int]
    """Generated so far; the row decodes from the first one on. None before the last segment."""
    is_last: bool = True
    """Whether the prompt is complete, so that the row takes part in decoding."""
    fork: Fork | None = None
    """Set where no segment is copied, because another row has the same prompt."""


@dataclass(frozen=True)
class DecodeRow:
    """A row of the batch in a decode step."""

    row: int
    request_id: str
    position: int
    """Position of the row's last token, whose key and value the step appends."""
    output_index: int
    """Index in the output of the first token that this execution generates."""


@dataclass(frozen=True)
class Decode:
    """Decode steps of all occupied rows."""

    rows: tuple[DecodeRow, ...]
    num_steps: int
    grammar_bitmasks: dict[int, np.ndarray]
    """By row, where the output follows a grammar: [W] words of the tokens that may be sampled."""


@dataclass(frozen=True)
class RowCompression:
    """A row that is compressed again, before its next token is appended."""

    row: int
    request_id: str
    position: int
    """Position of the row's last token."""
    num_tokens: int
    """Tokens of the head that holds the most."""
    budgets: np.ndarray
    """[L, K] tokens."""
    fixed_lengths: np.ndarray
    """[L, K] first tokens of each head that stay, because they belong to a cached prefix."""


@dataclass(frozen=True)
class SchedulerOutput:
    """One execution; parts that are None or empty are left out."""

    index: int
    """Counts the outputs from 0."""
    resets_cache: bool
    """Whether the cache is emptied first: a step has failed, and all requests start over."""
    preempted_request_ids: tuple[str, ...]
    finished_request_ids: tuple[str, ...]
    """Requests that have ended or were aborted since the last output."""
    released_rows: tuple[int, ...]
    """Rows that were freed since the last output."""
    page_table_update: PageTableUpdate
    insertion: Insertion | None
    prefill: PrefillChunks | None
    decode: Decode | None
    compressions: tuple[RowCompression, ...] = ()
    """Rows that are compressed again, while they decode, before the steps of `decode`."""
    replications_before_insertion: tuple[PageReplication, ...] = ()
    """Heads of prefixes that are copied, so that other replicas can serve rows that share them."""
    replications_before_prefill: tuple[PageReplication, ...] = ()
    """The same; their pages may be in use until the insertion is done."""
    more_insertions: tuple[Insertion, ...] = ()
    """Insertions of the prompts that were packed with that of `insertion`."""

    @property
    def insertions(self) -> tuple[Insertion, ...]:
        """All insertions, in their order."""
        return () if self.insertion is None else (self.insertion, *self.more_insertions)


@dataclass(frozen=True)
class SampledTokens:
    """Sampled tokens on the host, with leading axes of steps and rows.

    The log-probabilities are zeros unless a row of the batch asked for them.
    """

    tokens: np.ndarray
    logprob: np.ndarray
    rank: np.ndarray
    top_tokens: np.ndarray
    top_logprobs: np.ndarray


@dataclass(frozen=True)
class KeptTokens:
    """What the compressed cache of a prompt has kept."""

    lengths: np.ndarray
    """[L, K] tokens."""
    positions: list[list[np.ndarray]] | None
    """For each layer and head its kept positions, ascending; None unless asked for."""


@dataclass(frozen=True)
class PrefillResult:
    """What the devices know at the end of a prompt."""

    kept: KeptTokens
    first_token: SampledTokens | None
    """One step of one row, or of several for `PrefillChunks.also_samples` and `packed`; None where
    no token was to be sampled."""
    prompt_logprobs: SampledTokens | None
    """For each token of the prompt but the first: one row, with a leading axis of them."""


@dataclass(frozen=True)
class ExecutionResult:
    """What the devices know after an execution."""

    prefill: PrefillResult | None
    """With the last chunk of a prompt."""
    sampled: SampledTokens | None
    """[steps, batch], of which the first `num_steps` count, where the execution decoded."""
    compressed_lengths: tuple[np.ndarray, ...] = ()
    """For each of the output's compressions, [L, K] tokens that the heads have kept."""


@dataclass(frozen=True)
class NewTokens:
    """New tokens of one request."""

    request_id: str
    sampled: SampledTokens | None
    """The arrays that hold its tokens, at `row` and `steps`; None if no token was requested."""
    row: int
    steps: range
    prefill: PrefillResult | None = None
    """With the first token of a request, or when its prompt was only read."""
    num_cached_tokens: int = 0
    """Prompt tokens whose compressed cache was there already; set with `prefill`."""
