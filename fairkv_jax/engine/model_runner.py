"""Runs what the scheduler decides: the weights, the KV cache and the compiled programs.

`execute` takes a `SchedulerOutput` and returns at once; the result comes when it is asked for. The
runner never looks at a clock or a queue, and the same outputs give the same tokens.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from fairkv_jax.cache import KVCache, TableWrites
from fairkv_jax.checkpoint import Checkpoint
from fairkv_jax.compress.instruction import RepeatInstruction
from fairkv_jax.compress.registry import make_decode_method, offered_methods
from fairkv_jax.config import EngineConfig, KVConfig
from fairkv_jax.engine.cache_size import size_cache
from fairkv_jax.engine.decode_compression import DecodeCompression
from fairkv_jax.engine.device_errors import (
    POOL_DOES_NOT_FIT,
    WEIGHTS_DO_NOT_FIT,
    translate_xla_errors,
)
from fairkv_jax.engine.device_inputs import DeviceInputs
from fairkv_jax.engine.execution import (
    Execution,
    PendingPrefill,
    PrefillTask,
)
from fairkv_jax.engine.page_tables import PageCopies, PageReplication
from fairkv_jax.engine.prefill_chunking import Packing, prefill_bucket
from fairkv_jax.engine.prefill_runner import PrefillRunner
from fairkv_jax.engine.programs import Programs
from fairkv_jax.engine.scheduler_output import (
    Decode,
    Fork,
    Insertion,
    NewRequest,
    PrefillChunks,
    RowCompression,
    RowPrefix,
    SchedulerOutput,
)
from fairkv_jax.plan import Plan
from fairkv_jax.prefill_carry import CompressedPrefix
from fairkv_jax.sampling import Sampled, TokenHistory
from fairkv_jax.sampling_params import SamplingParams, num_bitmask_words
from fairkv_jax.shapes import next_power_of_two
from fairkv_jax.sharding.load_weights import load_model
from fairkv_jax.sharding.mesh import make_mesh
from fairkv_jax.sharding.slots import SlotLayout
from fairkv_jax.sharding.step_shapes import StepShapes


class ModelRunner:
    """Owns the model and the KV cache on a mesh; its KV heads are laid out by a plan.

    Raises:
        ValueError: the devices, the method or the cache's size do not fit the configuration.
    """

    max_in_flight = 2
    """Most executions in flight; with two, the devices do not wait for the host."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        config: EngineConfig,
        kv_config: KVConfig,
        *,
        eos_token_ids: Iterable[int] = (),
        instruction: RepeatInstruction | None = None,
        progress: bool = True,
    ):
        """`instruction` replaces the one that is made with the checkpoint's tokenizer."""
        self.model_config = checkpoint.config
        self.plan, self.config, self.kv_config = plan, config, kv_config
        self.layout = SlotLayout.from_plan(plan)
        self.mesh = make_mesh(config.tensor_parallel_size)
        self.cache_spec = size_cache(
            config, self.model_config, self.layout, kv_config.num_stored_queries
        )
        self.methods = offered_methods(kv_config)
        self.decode_method = make_decode_method(kv_config)
        """How rows are compressed while they decode; None: they never are."""
        self.decode_compression = None
        if kv_config.decode_budget is not None and self.decode_method is not None:
            num_protected = self.decode_method.scorer.num_sinks + kv_config.decode_window
            self.decode_compression = DecodeCompression(
                kv_config.decode_budget, kv_config.decode_interval, num_protected
            )
        int8 = config.quantization == "int8"
        with translate_xla_errors("loading the weights", WEIGHTS_DO_NOT_FIT):
            model = load_model(
                checkpoint, self.layout, self.mesh, config.dtype, int8=int8, progress=progress
            )
            self.model = jax.block_until_ready(model)
        self.instruction = instruction
        """How the model is told to repeat a prompt; None where no method needs that."""
        if instruction is None and kv_config.repeats_prompt:
            self.instruction = RepeatInstruction.of(checkpoint.tokenizer(), kv_config.replay_suffix)
        self.packing = Packing.of(self.model_config, config, kv_config)
        shapes = StepShapes(self.mesh, self.model_config, self.layout, self.cache_spec, self.model)
        self.programs = Programs(
            shapes,
            config,
            kv_config,
            self.methods,
            self.instruction,
            self.packing,
            self.decode_method,
            self._row_buckets,
            show=progress,
        )
        self._prefills = PrefillRunner(
            self.programs,
            self.model,
            self.layout,
            config,
            kv_config,
            self.methods,
            self.instruction,
        )
        self._inputs = DeviceInputs(
            self.mesh,
            self.cache_spec,
            self.model_config.vocab_size,
            eos_token_ids,
            self.programs.max_table_writes,
        )
        self.cache = self._empty_cache()
        self._requests: dict[int, NewRequest] = {}
        """By row."""
        self._task: PrefillTask | None = None

    def execute(self, output: SchedulerOutput) -> Execution:
        """Gives the devices one output; returns before it is done."""
        num_programs = self.programs.num_compiled
        if output.resets_cache:
            self.reset()
        if output.released_rows:
            self._release(output.released_rows)
        if self._task is not None:
            self._task.waiting.difference_update(output.finished_request_ids)
            if not self._task.waiting:
                self._task = None
        writes = list(self._inputs.table_writes(output.page_table_update))
        # A decode step takes one part of the changes itself; what comes before it needs them all.
        only_decodes = (
            output.insertion is None and output.prefill is None and not output.compressions
        )
        last = writes.pop() if writes and output.decode and only_decodes else None
        for part in writes:
            table = self.programs.write_tables()(self.cache.page_table, part)
            self.cache = replace(self.cache, page_table=table)
        self._replicate_pages(output.replications_before_insertion)
        for insertion in output.insertions:
            self._insert(insertion)
        self._replicate_pages(output.replications_before_prefill)
        prefill = None if output.prefill is None else self._prefill(output.prefill)
        compressed = tuple(map(self._compress_row, output.compressions))
        sampled = None if output.decode is None else self._decode(output.decode, last)
        has_compiled = self.programs.num_compiled > num_programs
        progress = None if output.prefill is None or self._task is None else self._task.progress
        return Execution(output, has_compiled, sampled, prefill, progress, compressed)

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
        request = NewRequest("", token_ids, SamplingParams(), 0, keeps_whole=True)
        task = self.start_prefill(request, kv_config, cached_prefix=prefix)
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
        """Appends the tokens that `extend` kept of `token_ids` to the prefix's row.

        The page tables on the devices must have the pages already.

        Args:
            slot_lengths: [L, P*C] tokens of the row afterwards, as
                `KVCacheManager.reserve_suffix` returns them.
            output_token_ids: Generated so far; the row decodes from the first one on.

        Returns:
            What the row holds now.
        """
        prompt = [*prefix.token_ids, *token_ids]
        bucket = prefill_bucket(len(token_ids), self.config)
        program = self.programs.insert(bucket, has_prefix=True)
        self._copy(program, suffix, prefix.row, slot_lengths, [*prompt, *output_token_ids])
        return RowPrefix(prefix.row, prompt, slot_lengths)

    def start_prefill(
        self,
        request: NewRequest,
        kv_config: KVConfig | None = None,
        *,
        cached_prefix: RowPrefix | None = None,
        packed: tuple[NewRequest, ...] = (),
    ) -> PrefillTask:
        """Starts the prefill of a prompt, or of a segment of one, see `PrefillRunner.start`."""
        return self._prefills.start(request, kv_config, cached_prefix=cached_prefix, packed=packed)

    def run_chunks(self, task: PrefillTask, start: int, stop: int) -> None:
        """Runs chunks [start, stop) of a prefill; the KV cache is not touched."""
        self._prefills.run_chunks(task, start, stop, self.cache)

    def sample_first(
        self,
        task: PrefillTask,
        grammar_bitmask: np.ndarray | None = None,
        request: NewRequest | None = None,
    ) -> Sampled:
        """Samples the token that follows a prompt, all of whose chunks have run.

        `request` is one with the same prompt; None: the task's own.
        """
        return self._sample_first(
            task.prefix.logits, task.prompt(), request or task.request, grammar_bitmask
        )

    def warm_up(
        self,
        prompt_lengths: Iterable[int],
        num_rows: int,
        *,
        suffix_lengths: Iterable[int] = (),
        prompt_logprobs: bool = True,
        forks: bool = False,
    ) -> None:
        """Compiles what prompts of these lengths and batches of up to `num_rows` rows run.

        `suffix_lengths` are those of what follows prefixes in the cache; `forks` says whether rows
        may begin with the prompt of another.
        """
        self.programs.warm_up(
            [*prompt_lengths, *[1] * forks],
            sorted({self.batch_bucket(rows + 1) for rows in range(num_rows)}),
            suffix_lengths=suffix_lengths,
            prompt_logprobs=prompt_logprobs,
            forks=forks,
        )

    def reset(self) -> None:
        """Empties the cache and forgets all rows and the prefill."""
        for array in jax.tree.leaves(self.cache):
            array.delete()  # there is no room for two
        self.cache = self._empty_cache()
        self._requests.clear()
        self._task = None
        self._inputs.rows_have_changed()

    def batch_bucket(self, num_rows: int) -> int:
        """The compiled batch that holds the first `num_rows` rows."""
        return min(next_power_of_two(num_rows), self.config.max_num_seqs)

    @property
    def _row_buckets(self) -> list[int]:
        """The tokens per head of rows for which `compress_row` is compiled, ascending."""
        if self.decode_compression is None:
            return []
        return self.decode_compression.buckets(self.config.page_size, self.config.max_model_len)

    def _empty_cache(self) -> KVCache:
        with translate_xla_errors("making the KV pool", POOL_DOES_NOT_FIT):
            return jax.block_until_ready(KVCache.empty(self.mesh, self.cache_spec))

    def _release(self, rows: tuple[int, ...]) -> None:
        """Sets the lengths of released rows to 0."""
        keeps = np.ones(self.config.max_num_seqs, np.int32)
        keeps[list(rows)] = 0
        lengths = self.programs.release_rows()(self.cache.lengths, keeps)
        self.cache = replace(self.cache, lengths=lengths)
        for row in rows:
            self._requests.pop(row, None)
        self._inputs.rows_have_changed()

    def _insert(self, insertion: Insertion) -> None:
        """Copies the segment that has just been prefilled into its row, or shares a prompt."""
        if insertion.fork is not None:
            self._fork(insertion, insertion.fork)
            return
        task = self._task
        assert task is not None
        place = [each.request_id for each in task.requests].index(insertion.request_id)
        request, num_after = task.requests[place], task.shape.num_tokens - task.ends[place]
        known = [*task.prompt(place), *insertion.output_token_ids]
        has_prefix = task.cached_prefix is not None
        program = self.programs.insert(task.shape.bucket, has_prefix=has_prefix)
        row, lengths = insertion.row, insertion.slot_lengths
        self._copy(
            program,
            task.prefix,
            row,
            lengths,
            known,
            num_after=num_after,
            is_active=insertion.is_last,
        )
        task.waiting.discard(insertion.request_id)
        if not task.waiting:
            self._task = None
        if insertion.is_last:
            self._requests[row] = request
            self._inputs.rows_have_changed()

    def _fork(self, insertion: Insertion, fork: Fork) -> None:
        """Lets a row begin with pages that hold its prompt already."""
        request, bucket = fork.new_request, prefill_bucket(1, self.config)
        self._copy_pages(fork.page_copies)
        start = self.programs.start_prefill(bucket)
        zeros = np.zeros(bucket, np.int32)
        nothing = start(self.model, zeros, np.int32(0), zeros).prefix
        known = [*request.prompt_token_ids, *insertion.output_token_ids]
        program = self.programs.insert(bucket)
        self._copy(program, nothing, insertion.row, insertion.slot_lengths, known)
        self._requests[insertion.row] = request
        self._inputs.rows_have_changed()

    def _copy(
        self,
        program: Any,
        prefix: CompressedPrefix,
        row: int,
        slot_lengths: np.ndarray,
        known: list[int],
        *,
        num_after: int = 0,
        is_active: bool = True,
    ) -> None:
        """Copies a compressed cache into the pages of a row, by the `insert` of its bucket.

        The last `num_after` tokens of it belong to other prompts.
        """
        self.cache = program(
            self.cache,
            prefix,
            np.int32(row),
            slot_lengths,
            self._padded(known),
            np.int32(len(known)),
            np.int32(num_after),
            np.bool_(is_active),
        )

    def _prefill(self, chunks: PrefillChunks) -> PendingPrefill | None:
        """Runs chunks of a prompt; returns its pending results after the last chunk."""
        if chunks.new_request is not None:
            self._task = None  # the one before was abandoned, and its memory is needed
            prefix = chunks.cached_prefix
            if prefix is not None and prefix.page_copies is not None:
                self._copy_pages(prefix.page_copies)
            self._task = self.start_prefill(
                chunks.new_request, cached_prefix=prefix, packed=chunks.packed
            )
        task = self._task
        assert task is not None
        assert task.request.request_id == chunks.request_id
        self.run_chunks(task, chunks.start, chunks.stop)
        if not chunks.is_last:
            return None
        first = []
        if task.packed:
            first = [self._sample_packed(task, place) for place in range(len(task.requests))]
        elif chunks.samples_token:
            for request in (task.request, *chunks.also_samples):
                first.append(self.sample_first(task, chunks.grammar_bitmask, request))
        return PendingPrefill.of(task, self.layout, first, self._readable_prefix(task))

    def _sample_packed(self, task: PrefillTask, place: int) -> Sampled:
        """Samples the token that follows one of the prompts of a task."""
        request, stop = task.requests[place], task.ends[place]
        logits = task.prefix.logits
        if stop < task.shape.num_tokens:
            logits_at = self.programs.logits_at(task.shape.bucket)
            logits = logits_at(self.model, task.carry.hidden, np.int32(stop - 1))
        return self._sample_first(logits, task.prompt(place), request, None)

    def _sample_first(
        self,
        logits: jax.Array,
        prompt: list[int],
        request: NewRequest,
        grammar_bitmask: np.ndarray | None,
    ) -> Sampled:
        if grammar_bitmask is None:
            num_words = num_bitmask_words(self.model_config.vocab_size)
            grammar_bitmask = np.zeros(num_words, np.uint32)
        history: Any = self._padded(prompt)[None], np.array([len(prompt)], np.int32)
        return self.programs.sample_first()(
            logits,
            self._inputs.sampling([(request.sampling_params, request.seed)]),
            TokenHistory(*history),
            grammar_bitmask[None],
        )

    def _readable_prefix(self, task: PrefillTask) -> CompressedPrefix:
        """Returns a task's compressed cache; what is read of it is on this process's devices."""
        prefix = task.prefix
        if not task.request.return_kept_positions or not self.mesh.is_multi_process:
            return prefix
        gather = self.programs.gather_kept(task.shape.bucket)
        positions, lengths = gather(prefix.positions, prefix.slot_lengths)
        return replace(prefix, positions=positions, slot_lengths=lengths)

    def _copy_pages(self, copies: PageCopies) -> None:
        pages = self._inputs.page_copies(copies)
        pool = self.programs.copy_pages()(self.cache.pool, *pages)
        self.cache = replace(self.cache, pool=pool)

    def _replicate_pages(self, replications: Iterable[PageReplication]) -> None:
        for replication in replications:
            for pages in self._inputs.page_replications(replication):
                pool = self.programs.replicate_pages()(self.cache.pool, *pages)
                self.cache = replace(self.cache, pool=pool)

    def _compress_row(self, row: RowCompression) -> jax.Array:
        """Compresses a row again; returns the tokens that its heads have kept."""
        bucket = next(size for size in self._row_buckets if size >= row.num_tokens)
        self.cache, lengths = self.programs.compress_row(bucket)(
            self.model,
            self.cache,
            np.int32(row.row),
            np.int32(row.position),
            row.budgets,
            row.fixed_lengths,
            self.layout.head_of_slot,
        )
        return lengths

    def _decode(self, decode: Decode, writes: TableWrites | None) -> Sampled:
        batch = self.batch_bucket(decode.rows[-1].row + 1)
        inputs = self._inputs.decode(decode, self._requests, batch)
        self.cache, sampled = self.programs.decode(batch)(
            self.model,
            self.cache,
            inputs,
            self._inputs.no_writes() if writes is None else writes,
            np.int32(decode.num_steps),
        )
        return sampled

    def _padded(self, token_ids: list[int]) -> np.ndarray:
        """The tokens of a row, padded to as many as a row may have."""
        padded = np.zeros(self.config.max_model_len, np.int32)
        padded[: len(token_ids)] = token_ids
        return padded
