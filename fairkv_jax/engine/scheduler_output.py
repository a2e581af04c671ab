"""What the scheduler decides and what it learns, as plain data without JAX.

A `SchedulerOutput` says all that one execution does. The same sequence of outputs gives the same
tokens on every process, so it can be logged, replayed and broadcast. An execution does its parts in
the order of the fields: it releases rows, writes page tables, inserts a compressed prompt into a
row, runs chunks of another prompt's prefill, and decodes.
"""

from dataclasses import dataclass

import numpy as np

from fairkv_jax.engine.page_tables import PageTableUpdate
from fairkv_jax.sampling_params import SamplingParams


@dataclass(frozen=True)
class NewRequest:
    """A request as the model runner needs it."""

    request_id: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    seed: int
    kv_policy: str | None = None
    """Overrides the engine's policy; None: the engine's."""
    kv_budget: int | None = None
    return_kept_positions: bool = False


@dataclass(frozen=True)
class PrefillChunks:
    """Chunks [start, stop) of a prompt's `num_chunks`, see `PrefillChunking`."""

    request_id: str
    start: int
    stop: int
    num_chunks: int
    work: float
    """Approximate multiply-adds of these chunks."""
    new_request: NewRequest | None
    """Set with the first chunk, also when a preempted prompt is prefilled again."""
    samples_token: bool = False
    """Whether the token that follows the prompt is to be sampled after the last chunk."""
    grammar_bitmask: np.ndarray | None = None
    """[W] words of the tokens that may be sampled then; None: all."""

    @property
    def is_last(self) -> bool:
        return self.stop == self.num_chunks


@dataclass(frozen=True)
class Insertion:
    """A compressed prompt to be copied into an empty row of the cache."""

    request_id: str
    row: int
    slot_lengths: np.ndarray
    """[L, P*C] tokens of the slots that serve the row, 0 in the others."""
    output_token_ids: list[int]
    """Generated so far, at least one; the row decodes from the first one on."""


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
    """One step of one row; None where no token was to be sampled."""
    prompt_logprobs: SampledTokens | None
    """For each token of the prompt but the first: one row, with a leading axis of them."""


@dataclass(frozen=True)
class ExecutionResult:
    """What the devices know after an execution."""

    prefill: PrefillResult | None
    """With the last chunk of a prompt."""
    sampled: SampledTokens | None
    """[steps, batch], of which the first `num_steps` count, where the execution decoded."""


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
