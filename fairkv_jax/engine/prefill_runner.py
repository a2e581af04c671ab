"""Runs prefills: starts them, runs their chunks, and compresses what they have read."""

import numpy as np

from fairkv_jax.cache import KVCache, PrefixView
from fairkv_jax.compress.budgets import budgets_per_head, request_kv_config
from fairkv_jax.compress.contract import Method
from fairkv_jax.compress.instruction import RepeatInstruction
from fairkv_jax.compress.registry import make_method
from fairkv_jax.config import EngineConfig, KVConfig
from fairkv_jax.engine.execution import PrefillTask, logprobs_start
from fairkv_jax.engine.prefill_chunking import PrefillChunking, repetitions_of
from fairkv_jax.engine.programs import Programs
from fairkv_jax.engine.scheduler_output import NewRequest, RowPrefix
from fairkv_jax.models.model import Model
from fairkv_jax.prefill import split_at_layers
from fairkv_jax.sharding.slots import SlotLayout


class PrefillRunner:
    """Runs the prefill programs of one model; it holds no state of its own."""

    def __init__(
        self,
        programs: Programs,
        model: Model,
        layout: SlotLayout,
        config: EngineConfig,
        kv_config: KVConfig,
        methods: tuple[Method, ...],
        instruction: RepeatInstruction | None,
    ):
        """`methods` are those that requests may choose, `instruction` is for prompt repetitions."""
        self._programs, self._model, self._layout = programs, model, layout
        self._config, self._kv_config = config, kv_config
        self._methods, self._instruction = methods, instruction

    def start(
        self,
        request: NewRequest,
        kv_config: KVConfig | None = None,
        *,
        cached_prefix: RowPrefix | None = None,
        packed: tuple[NewRequest, ...] = (),
    ) -> PrefillTask:
        """Starts the prefill of a prompt, or with `cached_prefix`, of the segment that follows it.

        `kv_config` replaces the options that the request leads to. The prompts of `packed` follow
        in the same chunks; then all are kept whole.

        Raises:
            ValueError: prefix and suffix together are longer than `max_model_len`.
        """
        prompts, model = [each.prompt_token_ids for each in (request, *packed)], self._model.config
        prompt = [token_id for each in prompts for token_id in each]
        num_before = 0 if cached_prefix is None else len(cached_prefix.token_ids)
        if cached_prefix is not None and num_before + len(prompt) > self._config.max_model_len:
            raise ValueError(
                f"a prefix of {num_before} and a suffix of {len(prompt)} tokens exceed "
                f"max_model_len {self._config.max_model_len}: shorten them, or raise max_model_len"
            )
        kv_config = self._compression(request, kv_config)
        budgets = np.array(
            budgets_per_head(kv_config, len(prompt), model.num_layers, model.num_kv_heads), np.int32
        )
        shape = PrefillChunking.of(
            len(prompt),
            model,
            self._config,
            wants_logprobs=request.sampling_params.prompt_logprobs is not None,
            repetitions=repetitions_of(len(prompt), model, kv_config, self._instruction),
        )
        keeps_whole = bool((budgets >= len(prompt)).all())
        # No method sees what is kept whole.
        method = 0 if keeps_whole else self._methods.index(make_method(kv_config))
        padded, begins = np.zeros((2, shape.bucket), np.int32)
        padded[: len(prompt)] = prompt
        lengths = [len(each) for each in prompts]
        begins[: len(prompt)] = np.repeat(np.cumsum(lengths) - lengths, lengths)
        has_prefix = cached_prefix is not None
        start = self._programs.start_prefill(shape.bucket, has_prefix=has_prefix)
        carry = start(self._model, padded, np.int32(num_before), begins)
        return PrefillTask(
            request,
            cached_prefix,
            shape,
            padded,
            budgets,
            method,
            keeps_whole,
            carry,
            packed,
            {each.request_id for each in (request, *packed)},
        )

    def run_chunks(self, task: PrefillTask, start: int, stop: int, cache: KVCache) -> None:
        """Runs chunks [start, stop) of a prefill; `cache` holds its prefix, if it has one."""
        shape, prefix = task.shape, None
        if task.cached_prefix is not None:
            row, lengths = task.cached_prefix.row, task.cached_prefix.slot_lengths
            prefix = PrefixView.of(cache, np.int32(row), lengths)
        self._run_prompt(task, start, min(stop, shape.num_layer_chunks), prefix)
        for part, first, end in shape.repetition_calls(start, stop):
            self._repeat(task, part, first, end, prefix)
        if shape.repetitions and start < shape.num_cache_chunks <= stop:
            self._compress_prompt(task)
        for block in range(max(start, shape.num_cache_chunks), stop):
            at = logprobs_start(task, block - shape.num_cache_chunks)
            score = self._programs.score_prompt(shape.bucket)
            scores = score(self._model, task.carry.hidden, task.token_ids, np.int32(at))
            task.progress = scores.tokens
            task.prompt_logprobs.append(scores)

    def _run_prompt(
        self, task: PrefillTask, start: int, stop: int, prefix: PrefixView | None
    ) -> None:
        """Runs chunks of the prompt; each layer is compressed when it is complete."""
        shape, has_prefix = task.shape, prefix is not None
        length, method = np.int32(shape.num_tokens), np.int32(task.method)
        slots, heads = self._layout.head_of_slot, self._layout.first_slot
        # What is repeated later is kept whole until then.
        keeps_whole = task.keeps_whole or bool(shape.repetitions)
        run = self._programs.run_chunks
        compress = self._programs.compress_layer
        for first, end, layer in split_at_layers(
            start, stop, shape.num_layer_chunks // shape.num_layers, keeps_whole=keeps_whole
        ):
            task.carry, task.progress = run(shape.bucket, has_prefix=has_prefix)(
                self._model,
                task.carry,
                length,
                method,
                np.bool_(keeps_whole),
                (np.int32(first), np.int32(end)),
                slots,
                heads,
                prefix,
            )
            if layer is not None:
                task.carry = compress(shape.bucket, has_prefix=has_prefix)(
                    task.carry, np.int32(layer), length, task.budgets, method, slots, heads
                )

    def _repeat(
        self, task: PrefillTask, index: int, start: int, stop: int, prefix: PrefixView | None
    ) -> None:
        """Runs chunks of one of the repetitions of the prompt."""
        assert self._instruction is not None
        bucket, has_prefix = task.shape.bucket, prefix is not None
        part = self._instruction.parts(task.request.prompt_token_ids)[index]
        carry = task.repetition
        if carry is None:
            carry = self._programs.start_repetition(bucket, has_prefix=has_prefix)(self._model)
        tokens = np.zeros(carry.hidden.shape[0], np.int32)
        tokens[: len(part.token_ids)] = part.token_ids
        task.repetition, task.progress = self._programs.repeat_chunks(
            bucket, has_prefix=has_prefix
        )(
            self._model,
            carry,
            task.carry,
            tokens,
            np.int32(len(part.token_ids)),
            np.int32(task.shape.num_tokens),
            (np.int32(part.start), np.int32(part.stop)),
            (np.int32(start), np.int32(stop)),
            self._layout.head_of_slot,
            self._layout.first_slot,
            prefix,
        )

    def _compress_prompt(self, task: PrefillTask) -> None:
        """Compresses a prompt that has been repeated."""
        assert task.repetition is not None
        has_prefix = task.cached_prefix is not None
        task.carry = self._programs.compress_prompt(task.shape.bucket, has_prefix=has_prefix)(
            self._model,
            task.carry,
            task.repetition.stats,
            np.int32(task.shape.num_tokens),
            task.budgets,
            self._layout.head_of_slot,
            self._layout.first_slot,
        )
        task.repetition = None

    def _compression(self, request: NewRequest, kv_config: KVConfig | None) -> KVConfig:
        """Returns the options by which a segment is compressed."""
        if kv_config is not None:
            return kv_config
        if request.keeps_whole:
            return KVConfig()
        return request_kv_config(
            self._kv_config, request.kv_policy, request.kv_budget, request.kv_ratio
        )
