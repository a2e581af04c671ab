"""Runs what the scheduler decides: the weights, the KV cache and the compiled programs.

`execute` takes a `SchedulerOutput` and returns at once; the result comes when it is asked for. The
runner never looks at a clock or a queue, and the same outputs give the same tokens.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from fairkv_jax.cache import CachedPrefix, KVCache, TableWrites
from fairkv_jax.checkpoint import Checkpoint
from fairkv_jax.compress.budgets import budgets_per_head, request_kv_config
from fairkv_jax.compress.registry import make_method, offered_methods
from fairkv_jax.config import EngineConfig, KVConfig
from fairkv_jax.decode import DecodeInputs
from fairkv_jax.engine.device_errors import (
    POOL_DOES_NOT_FIT,
    WEIGHTS_DO_NOT_FIT,
    translate_xla_errors,
)
from fairkv_jax.engine.page_tables import PageTableUpdate
from fairkv_jax.engine.prefill_shape import (
    PrefillShape,
    logprobs_block,
    next_power_of_two,
    prefill_bucket,
)
from fairkv_jax.engine.programs import Programs
from fairkv_jax.engine.scheduler_output import (
    Decode,
    ExecutionResult,
    Insertion,
    KeptTokens,
    NewRequest,
    PrefillChunks,
    PrefillResult,
    SampledTokens,
    SchedulerOutput,
)
from fairkv_jax.kv_cache_spec import KVCacheSpec
from fairkv_jax.plan import Plan
from fairkv_jax.prefill import CompressedPrefix, PrefillCarry, split_at_layers
from fairkv_jax.sampling import Sampled, SamplingState, TokenHistory
from fairkv_jax.sampling_params import SamplingParams, num_bitmask_words
from fairkv_jax.sharding.load_weights import load_model
from fairkv_jax.sharding.mesh import make_mesh
from fairkv_jax.sharding.slots import SlotLayout
from fairkv_jax.sharding.step_shapes import StepShapes

_IDLE_ROW = (SamplingParams(temperature=0), 0)


@dataclass(frozen=True)
class RowPrefix:
    """The beginning of a prompt, which a row of the KV cache holds."""

    row: int
    token_ids: list[int]
    """All tokens of the prefix, also those that compression has dropped."""
    slot_lengths: np.ndarray
    """[L, P*C] cached tokens of the slots that serve the row, 0 in the others."""


@dataclass
class PrefillTask:
    """A prompt on its way through the layers."""

    request: NewRequest
    behind: RowPrefix | None
    """What the prompt is a suffix of; None: nothing precedes it."""
    shape: PrefillShape
    token_ids: np.ndarray
    """Padded to the bucket."""
    budgets: np.ndarray
    """[L, K] tokens."""
    method: int
    """The index of its method among the engine's."""
    keeps_whole: bool
    carry: PrefillCarry
    prompt_logprobs: list[Sampled]
    """Per block, as `score_prompt` gives them; perhaps not computed yet."""

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
    _prefill: "_PendingPrefill | None"
    _last_array: Any
    """Something that is there when the execution is done."""

    def result(self) -> ExecutionResult:
        """Waits for the devices and reads what they know."""
        if self.sampled is None and self._prefill is None:
            jax.block_until_ready(self._last_array)
        sampled = None
        if self.sampled is not None:
            sampled = _on_host(self.sampled)
        prefill = None if self._prefill is None else self._prefill.result()
        return ExecutionResult(prefill, sampled)


@dataclass(frozen=True)
class _PendingPrefill:
    task: PrefillTask
    layout: SlotLayout
    first_token: Sampled | None

    def result(self) -> PrefillResult:
        task, first = self.task, self.first_token
        positions = task.request.return_kept_positions
        return PrefillResult(
            kept_tokens(task.prefix, self.layout, positions=positions),
            None if first is None else _one_step(_on_host(first)),
            _prompt_logprobs(task) if task.prompt_logprobs else None,
        )


class ModelRunner:
    """Owns the model and the KV cache on a mesh; its KV heads are laid out by a plan.

    Raises:
        ValueError: the devices, the method or the cache's size do not fit the configuration.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        config: EngineConfig,
        kv_config: KVConfig,
        *,
        eos_token_ids: Iterable[int] = (),
        progress: bool = True,
    ):
        self.model_config = checkpoint.config
        self._eos_token_ids = tuple(eos_token_ids)
        self.plan, self.config, self.kv_config = plan, config, kv_config
        self.layout = SlotLayout.from_plan(plan)
        self.mesh = make_mesh(config.tensor_parallel_size)
        self.cache_spec = self._make_cache_spec()
        self.methods = offered_methods(kv_config)
        int8 = config.quantization == "int8"
        with translate_xla_errors("loading the weights", WEIGHTS_DO_NOT_FIT):
            model = load_model(
                checkpoint, self.layout, self.mesh, config.dtype, int8=int8, progress=progress
            )
            self.model = jax.block_until_ready(model)
        shapes = StepShapes(self.mesh, self.model_config, self.layout, self.cache_spec, self.model)
        self.programs = Programs(shapes, config, kv_config, self.methods, show=progress)
        self.cache = self._empty_cache()
        self._requests: dict[int, NewRequest] = {}
        """By row."""
        self._task: PrefillTask | None = None
        self._sampling: SamplingState | None = None
        """The rows' options on the devices; None when the rows have changed."""
        self._no_bitmasks: dict[int, jax.Array] = {}
        """By batch: stands for the bitmasks of rows without a grammar."""
        self._no_writes: TableWrites | None = None

    def execute(self, output: SchedulerOutput) -> Execution:
        """Gives the devices one output; returns before it is done."""
        num_programs = self.programs.num_compiled
        if output.released_rows:
            self._release(output.released_rows)
        if self._task is not None and (
            self._task.request.request_id in output.finished_request_ids
        ):
            self._task = None
        writes = list(self._table_writes(output.page_table_update))
        # The step itself takes one part of the changes; a row is inserted after all of them.
        last = writes.pop() if writes and output.decode and not output.insertion else None
        for part in writes:
            table = self.programs.write_tables()(self.cache.page_table, part)
            self.cache = replace(self.cache, page_table=table)
        if output.insertion is not None:
            self._insert(output.insertion)
        prefill = None if output.prefill is None else self._prefill(output.prefill)
        sampled = None if output.decode is None else self._decode(output.decode, last)
        has_compiled = self.programs.num_compiled > num_programs
        carry = self._task.carry.hidden if self._task is not None else None
        return Execution(output, has_compiled, sampled, prefill, carry)

    def prefill(self, token_ids: list[int], kv_config: KVConfig | None = None) -> CompressedPrefix:
        """Runs a prompt through the model and compresses its cache, all at once."""
        task = self.start_prefill(NewRequest("", token_ids, SamplingParams(), 0), kv_config)
        self.run_chunks(task, 0, task.shape.num_chunks)
        return task.prefix

    def extend(
        self, prefix: RowPrefix, token_ids: list[int], kv_config: KVConfig | None = None
    ) -> CompressedPrefix:
        """Prefills the tokens that follow a prefix in the KV cache, all at once.

        They attend to what the cache holds of the prefix, and to themselves; their positions go on
        as if nothing had been dropped. They are kept whole, or compressed as `kv_config` says. The
        KV cache is not changed, see `append`.

        Raises:
            ValueError: prefix and suffix together are longer than `max_model_len`.
        """
        request = NewRequest("", token_ids, SamplingParams(), 0)
        task = self.start_prefill(request, kv_config, behind=prefix)
        self.run_chunks(task, 0, task.shape.num_chunks)
        return task.prefix

    def append(
        self,
        prefix: RowPrefix,
        token_ids: list[int],
        suffix: CompressedPrefix,
        slot_lengths: np.ndarray,
        output_token_ids: list[int],
    ) -> RowPrefix:
        """Copies what `extend` has kept of `token_ids` behind the tokens of the prefix's row.

        The page tables on the devices must have the pages already.

        Args:
            slot_lengths: [L, P*C] tokens of the row afterwards, as
                `KVCacheManager.reserve_suffix` returns them.
            output_token_ids: Generated so far; the row decodes from the first one on.

        Returns:
            What the row holds now.
        """
        prompt = [*prefix.token_ids, *token_ids]
        bucket = prefill_bucket(len(token_ids), self.config.max_model_len)
        program = self.programs.insert(bucket, has_prefix=True)
        self._copy(program, suffix, prefix.row, slot_lengths, [*prompt, *output_token_ids])
        return RowPrefix(prefix.row, prompt, slot_lengths)

    def start_prefill(
        self,
        request: NewRequest,
        kv_config: KVConfig | None = None,
        *,
        behind: RowPrefix | None = None,
    ) -> PrefillTask:
        """Begins a prompt, or with `behind` the suffix of one, which is then the request's prompt.

        `kv_config` replaces the options that the request leads to; without it a suffix is kept
        whole.

        Raises:
            ValueError: prefix and suffix together are longer than `max_model_len`.
        """
        prompt, model = request.prompt_token_ids, self.model_config
        num_before = 0 if behind is None else len(behind.token_ids)
        if behind is not None and num_before + len(prompt) > self.config.max_model_len:
            raise ValueError(
                f"a prefix of {num_before} and a suffix of {len(prompt)} tokens exceed "
                f"max_model_len {self.config.max_model_len}: shorten them, or raise max_model_len"
            )
        shape = PrefillShape.of(
            len(prompt),
            model,
            self.config,
            wants_logprobs=request.sampling_params.prompt_logprobs is not None,
        )
        padded = np.zeros(shape.bucket, np.int32)
        padded[: len(prompt)] = prompt
        budgets, method = self._compression(request, kv_config, is_suffix=behind is not None)
        start = self.programs.start_prefill(shape.bucket, has_prefix=behind is not None)
        return PrefillTask(
            request,
            behind,
            shape,
            padded,
            budgets,
            method,
            bool((budgets >= len(prompt)).all()),
            start(self.model, padded, np.int32(num_before)),
            [],
        )

    def run_chunks(self, task: PrefillTask, start: int, stop: int) -> None:
        """Runs chunks [start, stop) of a prefill; the KV cache is not touched."""
        bucket, layer_chunks = task.shape.bucket, task.shape.num_layer_chunks
        behind, prefix = task.behind, None
        if behind is not None:
            prefix = CachedPrefix.of(self.cache, np.int32(behind.row), behind.slot_lengths)
        has_prefix = behind is not None
        length, method = np.int32(task.shape.num_tokens), np.int32(task.method)
        slots, heads = self.layout.head_of_slot, self.layout.first_slot
        calls = split_at_layers(
            start,
            min(stop, layer_chunks),
            layer_chunks // task.shape.num_layers,
            keeps_whole=task.keeps_whole,
        )
        for first, end, layer in calls:
            task.carry = self.programs.run_chunks(bucket, has_prefix=has_prefix)(
                self.model,
                task.carry,
                length,
                method,
                np.bool_(task.keeps_whole),
                (np.int32(first), np.int32(end)),
                slots,
                heads,
                prefix,
            )
            if layer is not None:
                task.carry = self.programs.compress_layer(bucket, has_prefix=has_prefix)(
                    task.carry, np.int32(layer), length, task.budgets, method, slots, heads
                )
        for block in range(max(start, layer_chunks), stop):
            at = _logprobs_start(task, block - layer_chunks)
            score = self.programs.score_prompt(bucket)
            scores = score(self.model, task.carry.hidden, task.token_ids, np.int32(at))
            task.prompt_logprobs.append(scores)

    def sample_first(
        self,
        prefix: CompressedPrefix,
        request: NewRequest,
        grammar_bitmask: np.ndarray | None = None,
    ) -> Sampled:
        """Samples the token that follows a prompt."""
        prompt, vocab_size = request.prompt_token_ids, self.model_config.vocab_size
        if grammar_bitmask is None:
            grammar_bitmask = np.zeros(num_bitmask_words(vocab_size), np.uint32)
        history: Any = self._padded(prompt)[None], np.array([len(prompt)], np.int32)
        return self.programs.sample_first()(
            prefix.logits,
            self._stack([(request.sampling_params, request.seed)]),
            TokenHistory(*history),
            grammar_bitmask[None],
        )

    def warm_up(self, prompt_lengths: Any, num_rows: int, *, prompt_logprobs: bool = True) -> None:
        """Compiles what prompts of these lengths and batches of up to `num_rows` rows run."""
        batches = {self.batch_bucket(rows + 1) for rows in range(num_rows)}
        self.programs.warm_up(prompt_lengths, sorted(batches), prompt_logprobs=prompt_logprobs)

    def reset(self) -> None:
        """Starts over with an empty cache; nobody owns a row any more."""
        for array in jax.tree.leaves(self.cache):
            array.delete()  # there is no room for two
        self.cache = self._empty_cache()
        self._requests.clear()
        self._task = self._sampling = None

    def batch_bucket(self, num_rows: int) -> int:
        """The compiled batch that holds the first `num_rows` rows."""
        return min(next_power_of_two(num_rows), self.config.max_num_seqs)

    def _empty_cache(self) -> KVCache:
        with translate_xla_errors("making the KV pool", POOL_DOES_NOT_FIT):
            return jax.block_until_ready(KVCache.empty(self.mesh, self.cache_spec))

    def _release(self, rows: tuple[int, ...]) -> None:
        """Takes away all tokens of rows that nobody owns any more."""
        keeps = np.ones(self.config.max_num_seqs, np.int32)
        keeps[list(rows)] = 0
        lengths = self.programs.release_rows()(self.cache.lengths, keeps)
        self.cache = replace(self.cache, lengths=lengths)
        for row in rows:
            self._requests.pop(row, None)
        self._sampling = None

    def _insert(self, insertion: Insertion) -> None:
        """Copies the prompt that has just been prefilled into its row."""
        task = self._task
        assert task is not None
        assert task.request.request_id == insertion.request_id
        known = [*task.request.prompt_token_ids, *insertion.output_token_ids]
        program = self.programs.insert(task.shape.bucket)
        self._copy(program, task.prefix, insertion.row, insertion.slot_lengths, known)
        self._requests[insertion.row] = task.request
        self._task = self._sampling = None

    def _copy(
        self,
        program: Any,
        prefix: CompressedPrefix,
        row: int,
        slot_lengths: np.ndarray,
        known: list[int],
    ) -> None:
        """Copies a compressed cache into the pages of a row, by the `insert` of its bucket."""
        tokens = self._padded(known), np.int32(len(known))
        self.cache = program(self.cache, prefix, np.int32(row), slot_lengths, *tokens)

    def _compression(
        self, request: NewRequest, kv_config: KVConfig | None, *, is_suffix: bool
    ) -> tuple[np.ndarray, int]:
        """Returns the budgets [L, K] of a prompt, and the index of its method."""
        model, num_tokens = self.model_config, len(request.prompt_token_ids)
        heads = model.num_layers, model.num_kv_heads
        if kv_config is None and is_suffix:
            return np.full(heads, num_tokens, np.int32), 0  # no method sees what is kept whole
        if kv_config is None:
            kv_config = request_kv_config(self.kv_config, request.kv_policy, request.kv_budget)
        budgets = budgets_per_head(kv_config, num_tokens, *heads)
        return np.array(budgets, np.int32), self.methods.index(make_method(kv_config))

    def _prefill(self, chunks: PrefillChunks) -> _PendingPrefill | None:
        """Runs chunks of a prompt; what comes of it, if they are the last ones."""
        if chunks.new_request is not None:
            self._task = None  # the one before was abandoned, and its memory is needed
            self._task = self.start_prefill(chunks.new_request)
        task = self._task
        assert task is not None
        assert task.request.request_id == chunks.request_id
        self.run_chunks(task, chunks.start, chunks.stop)
        if not chunks.is_last:
            return None
        first = None
        if chunks.samples_token:
            first = self.sample_first(task.prefix, task.request, chunks.grammar_bitmask)
        return _PendingPrefill(task, self.layout, first)

    def _decode(self, decode: Decode, writes: TableWrites | None) -> Sampled:
        batch = self.batch_bucket(decode.rows[-1].row + 1)
        positions, output_index = np.zeros((2, batch), np.int32)
        for each in decode.rows:
            positions[each.row] = each.position
            output_index[each.row] = each.output_index
        positions, output_index = self._on_all_devices((positions, output_index))
        bitmasks = self._bitmasks(batch, decode.grammar_bitmasks)
        inputs = DecodeInputs(positions, output_index, self._sampling_of(batch), bitmasks)
        program = self.programs.decode(batch)
        self.cache, sampled = program(
            self.model,
            self.cache,
            inputs,
            self._empty_writes() if writes is None else writes,
            np.int32(decode.num_steps),
        )
        return sampled

    def _sampling_of(self, batch: int) -> SamplingState:
        """The options of the first rows, on all devices."""
        sampling = self._sampling
        if sampling is None or len(sampling.temperature) != batch:
            options = [
                (request.sampling_params, request.seed) if request is not None else _IDLE_ROW
                for request in map(self._requests.get, range(batch))
            ]
            sampling = self._sampling = self._on_all_devices(self._stack(options))
        return sampling

    def _stack(self, options: list[tuple[SamplingParams, int]]) -> SamplingState:
        vocab_size = self.model_config.vocab_size
        return SamplingState.stack(options, vocab_size, self._eos_token_ids)

    def _bitmasks(self, batch: int, bitmasks: dict[int, np.ndarray]) -> jax.Array:
        """The bitmasks of a batch, on all devices."""
        shape = (batch, num_bitmask_words(self.model_config.vocab_size))
        if not bitmasks:
            if batch not in self._no_bitmasks:
                self._no_bitmasks[batch] = self._on_all_devices(np.zeros(shape, np.uint32))
            return self._no_bitmasks[batch]
        words = np.zeros(shape, np.uint32)
        for row, bitmask in bitmasks.items():
            words[row] = bitmask
        return self._on_all_devices(words)

    def _table_writes(self, update: PageTableUpdate) -> Iterator[TableWrites]:
        """The changes of the page tables, in parts that a program takes."""
        spec, size = self.cache_spec, self.programs.max_table_writes
        entry_device, entry = np.divmod(update.entry_index, spec.table_entries)
        row, slot = np.divmod(update.start_index, spec.num_slots)
        start_device, slot = np.divmod(slot, spec.slots_per_device)
        start = row * spec.slots_per_device + slot
        most = max(
            np.bincount(device, minlength=1).max() for device in (entry_device, start_device)
        )
        shape = (-(-most // size), spec.num_devices, size)
        pairs = spec.num_layers * spec.num_rows * spec.slots_per_device
        entries = _split(entry_device, entry, update.entry_value, shape, spec.table_entries)
        starts = _split(start_device, start, update.start_value, shape, pairs)
        for part in zip(*entries, *starts, strict=True):
            arrays: Any = part
            yield TableWrites(*arrays)

    def _empty_writes(self) -> TableWrites:
        """No changes, on the devices already: most steps open no page."""
        writes = self._no_writes
        if writes is None:
            spec = self.cache_spec
            size = (spec.num_devices, self.programs.max_table_writes)
            none: Any = np.full(size, np.iinfo(np.int32).max, np.int32)
            shardings = jax.tree.map(
                lambda part: NamedSharding(self.mesh, part), TableWrites.partition()
            )
            writes = TableWrites(none, none, none, none)
            writes = self._no_writes = jax.device_put(writes, shardings)
        return writes

    def _padded(self, token_ids: list[int]) -> np.ndarray:
        """The tokens of a row, padded to as many as a row may have."""
        padded = np.zeros(self.config.max_model_len, np.int32)
        padded[: len(token_ids)] = token_ids
        return padded

    def _on_all_devices(self, arrays: Any) -> Any:
        """Copies a pytree of arrays to every device."""
        return jax.device_put(arrays, NamedSharding(self.mesh, PartitionSpec()))

    def _make_cache_spec(self) -> KVCacheSpec:
        """Sizes the cache: all that the configuration grants, but no more than rows can fill."""
        config, model = self.config, self.model_config
        slots = int(self.layout.replicas.sum((0, 1)).max())
        one_row = slots * -(-config.max_model_len // config.page_size)
        spec = KVCacheSpec.fit(
            config.kv_cache_bytes,
            one_row * config.max_num_seqs,
            num_layers=model.num_layers,
            num_rows=config.max_num_seqs,
            num_devices=config.tensor_parallel_size,
            slots_per_device=self.layout.slots_per_device,
            head_dim=model.head_dim,
            page_size=config.page_size,
            max_tokens=config.max_model_len,
            dtype=config.dtype,
        )
        if spec.pages_per_device < one_row:
            need = replace(spec, pages_per_device=one_row).bytes_per_device
            raise ValueError(
                f"a pool of {config.kv_cache_bytes / 2**20:.0f} MiB cannot hold one request of "
                f"max_model_len {config.max_model_len}, which may need "
                f"{need * spec.num_devices / 2**20:.0f} MiB: "
                "raise kv_cache_memory_bytes or lower max_model_len"
            )
        return spec


def _split(
    devices: np.ndarray,
    indices: np.ndarray,
    values: np.ndarray,
    shape: tuple[int, int, int],
    unused: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Changes, sorted by device, in parts [parts, P, n] of indices and of values."""
    order = np.argsort(devices, kind="stable")
    devices = devices[order]
    counts = np.bincount(devices, minlength=shape[1])
    part, column = np.divmod(
        np.arange(len(devices)) - np.repeat(np.cumsum(counts) - counts, counts), shape[2]
    )
    split_indices = np.full(shape, unused, np.int32)
    split_values = np.zeros(shape, np.int32)
    split_indices[part, devices, column] = indices[order]
    split_values[part, devices, column] = values[order]
    return split_indices, split_values


def _on_host(sampled: Sampled) -> SampledTokens:
    """Waits for sampled tokens and reads them."""
    return SampledTokens(**vars(jax.device_get(sampled)))


def _one_step(sampled: SampledTokens) -> SampledTokens:
    """The same tokens with a leading axis of one step."""
    return SampledTokens(**{name: array[None] for name, array in vars(sampled).items()})


def _logprobs_start(task: PrefillTask, block: int) -> int:
    """Where a block of log-probabilities begins; the last may reach back into the one before."""
    size = logprobs_block(task.shape.bucket)
    return min(block * size, task.carry.hidden.shape[0] - size)


def _prompt_logprobs(task: PrefillTask) -> SampledTokens:
    """How likely each token of a prompt but the first was: [num_tokens - 1, 1]."""
    size, last = logprobs_block(task.shape.bucket), task.shape.num_tokens - 1
    blocks = [_on_host(block) for block in task.prompt_logprobs]
    joined = {}
    for name, first in vars(blocks[0]).items():
        values = np.empty((last, *first.shape[1:]), first.dtype)
        for index, block in enumerate(blocks):
            start = _logprobs_start(task, index)
            values[start : start + size] = getattr(block, name)[: last - start]
        joined[name] = values[:, None]
    return SampledTokens(**joined)


def kept_tokens(prefix: CompressedPrefix, layout: SlotLayout, *, positions: bool) -> KeptTokens:
    """Reads back which tokens a prefix kept; `positions` says whether to read their positions."""
    lengths = np.asarray(prefix.head_lengths)
    if not positions:
        return KeptTokens(lengths, None)
    num_layers = len(lengths)
    packed = np.asarray(prefix.positions).reshape(num_layers, layout.num_devices, -1)
    by_slot = np.asarray(prefix.slot_lengths).reshape(num_layers, layout.num_devices, -1)
    starts = (np.cumsum(by_slot, -1) - by_slot).reshape(num_layers, -1)

    def of_head(layer: int, head: int) -> np.ndarray:
        slot = layout.first_slot[layer, head]
        start = starts[layer, slot]
        return packed[layer, slot // layout.slots_per_device][start : start + lengths[layer, head]]

    heads = range(layout.num_heads)
    return KeptTokens(lengths, [[of_head(n, head) for head in heads] for n in range(num_layers)])
