"""Executions that the devices have been given, and how their results are read back."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import jax
import numpy as np

from fairkv_jax.engine.prefill_chunking import PrefillChunking, logprobs_block
from fairkv_jax.engine.scheduler_output import (
    ExecutionResult,
    KeptTokens,
    NewRequest,
    PrefillResult,
    RowPrefix,
    SampledTokens,
    SchedulerOutput,
)
from fairkv_jax.prefill_carry import CompressedPrefix, PrefillCarry
from fairkv_jax.repeat_prompt import RepetitionCarry
from fairkv_jax.sampling import Sampled
from fairkv_jax.sharding.slots import SlotLayout


@dataclass
class PrefillTask:
    """A prompt, or a segment of one, on its way through the layers."""

    request: NewRequest
    cached_prefix: RowPrefix | None
    """What the segment continues; None: nothing precedes it."""
    shape: PrefillChunking
    token_ids: np.ndarray
    """Padded to the bucket."""
    budgets: np.ndarray
    """[L, K] tokens."""
    method: int
    """The index of its method among the engine's."""
    keeps_whole: bool
    carry: PrefillCarry
    packed: tuple[NewRequest, ...] = ()
    """Requests whose prompts are packed behind the first, in the same chunks."""
    waiting: set[str] = field(default_factory=set)
    """Ids of the requests whose prompts have not been inserted into rows."""
    prompt_logprobs: list[Sampled] = field(default_factory=list)
    """Per block, as `score_prompt` gives them; perhaps not computed yet."""
    progress: Any = None
    """An array that is computed with the chunks that were given to the devices last."""
    repetition: RepetitionCarry | None = None
    """The repetition of the prompt that is under way."""

    def prompt(self, place: int = 0) -> list[int]:
        """The prompt of one of the requests, up to the end of the segment."""
        before = [] if self.cached_prefix is None else self.cached_prefix.token_ids
        return [*before, *self.requests[place].prompt_token_ids]

    @property
    def requests(self) -> tuple[NewRequest, ...]:
        """All requests, in the order of their prompts."""
        return self.request, *self.packed

    @property
    def ends(self) -> list[int]:
        """Where their prompts end, counted in tokens of the segment."""
        return list(accumulate(len(each.prompt_token_ids) for each in self.requests))

    @property
    def prefix(self) -> CompressedPrefix:
        """The compressed cache; complete when all chunks have run."""
        return self.carry.prefix


@dataclass(frozen=True)
class Execution:
    """An output that the devices have been given."""

    output: SchedulerOutput
    has_compiled: bool
    """Whether programs had to be compiled first."""
    sampled: Sampled | None
    """On the devices, perhaps not computed yet."""
    prefill: "PendingPrefill | None"
    """The results of a prompt whose last chunk this was."""
    progress: Any
    """An array that is computed with the chunks of a prefill; None without them."""
    compressed_lengths: tuple[jax.Array, ...] = ()
    """On the devices: [L, K] tokens of each row that was compressed again."""

    def result(self) -> ExecutionResult:
        """Waits for the devices and reads what they know."""
        # Not only the tokens: on CPU, chunks and steps run side by side, and chunks that nobody
        # waited for would pile up.
        jax.block_until_ready(self.progress)
        sampled = None
        if self.sampled is not None:
            sampled = _on_host(self.sampled)
        prefill = None if self.prefill is None else self.prefill.result()
        compressed = tuple(map(np.asarray, self.compressed_lengths))
        return ExecutionResult(prefill, sampled, compressed)


@dataclass(frozen=True)
class PendingPrefill:
    """What is read at the end of a prompt; it does not hold on to the rest of the carry."""

    prefix: CompressedPrefix
    layout: SlotLayout
    wants_positions: bool
    first_tokens: Sequence[Sampled]
    num_tokens: int
    logprobs: list[tuple[int, Sampled]]
    """Blocks of the prompt's log-probabilities, and where each begins."""

    @classmethod
    def of(
        cls,
        task: PrefillTask,
        layout: SlotLayout,
        first_tokens: Sequence[Sampled] = (),
        prefix: CompressedPrefix | None = None,
    ) -> "PendingPrefill":
        """The results of a prefill whose chunks have all been given to the devices.

        `prefix` replaces the task's own, where this process cannot read all arrays of that.
        """
        blocks = task.prompt_logprobs
        starts = [logprobs_start(task, index) for index in range(len(blocks))]
        return cls(
            prefix or task.prefix,
            layout,
            task.request.return_kept_positions,
            first_tokens,
            task.shape.num_tokens,
            list(zip(starts, blocks, strict=True)),
        )

    def result(self) -> PrefillResult:
        """Waits for the devices and reads the results."""
        first = [_on_host(each) for each in self.first_tokens]
        return PrefillResult(
            kept_tokens(self.prefix, self.layout, positions=self.wants_positions),
            _one_step(first) if first else None,
            self._prompt_logprobs() if self.logprobs else None,
        )

    def _prompt_logprobs(self) -> SampledTokens:
        """How likely each token of a prompt but the first was: [num_tokens - 1, 1]."""
        last = self.num_tokens - 1
        blocks = [(start, vars(_on_host(block))) for start, block in self.logprobs]
        joined = {}
        for name, first in blocks[0][1].items():
            values = np.empty((last, *first.shape[1:]), first.dtype)
            for start, block in blocks:
                values[start : start + len(first)] = block[name][: last - start]
            joined[name] = values[:, None]
        return SampledTokens(**joined)


def _on_host(sampled: Sampled) -> SampledTokens:
    """Waits for sampled tokens and reads them."""
    return SampledTokens(**vars(jax.device_get(sampled)))


def _one_step(rows: Sequence[SampledTokens]) -> SampledTokens:
    """The tokens of all rows, one after the other, with a leading axis of one step."""
    names = vars(rows[0])
    return SampledTokens(
        **{name: np.concatenate([getattr(row, name) for row in rows])[None] for name in names}
    )


def logprobs_start(task: PrefillTask, block: int) -> int:
    """Where a block of log-probabilities begins; the last may reach back into the one before."""
    size = logprobs_block(task.shape.bucket)
    return min(block * size, task.carry.hidden.shape[0] - size)


def kept_tokens(prefix: CompressedPrefix, layout: SlotLayout, *, positions: bool) -> KeptTokens:
    """Reads back which tokens a prefix kept; `positions` says whether to read their positions."""
    lengths = np.asarray(prefix.head_lengths)
    if not positions:
        return KeptTokens(lengths, None)
    num_layers, num_devices = len(lengths), layout.num_devices
    packed = np.asarray(prefix.positions).reshape(num_devices, -1)
    by_device = np.asarray(prefix.slot_lengths).reshape(num_layers, num_devices, -1)
    ends = np.cumsum(by_device.swapaxes(0, 1).reshape(num_devices, -1), -1)
    ends = ends.reshape(num_devices, num_layers, -1)

    def of_head(layer: int, head: int) -> np.ndarray:
        device, slot = divmod(layout.first_slot[layer, head], layout.slots_per_device)
        end = ends[device, layer, slot]
        return packed[device, end - lengths[layer, head] : end]

    heads = range(layout.num_heads)
    return KeptTokens(lengths, [[of_head(n, head) for head in heads] for n in range(num_layers)])
