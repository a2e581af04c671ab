"""The engine's three verbs: prefill a prompt, insert it into a row, generate tokens for all rows.

It owns the model and the cache, and knows rows, not requests: which request sits where, and what
its tokens mean, is the scheduler's business.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.stages import Compiled

from fairkv_jax.cache import KVCache, PageBook
from fairkv_jax.checkpoint import Checkpoint
from fairkv_jax.compress.budgets import budgets_per_head, max_kept_per_layer
from fairkv_jax.compress.registry import make_method, offered_methods
from fairkv_jax.config import EngineConfig, KVConfig
from fairkv_jax.decode import DecodeInputs, decode_step, idle_inputs
from fairkv_jax.engine.compiling import CompilingBar
from fairkv_jax.engine.device_errors import (
    POOL_DOES_NOT_FIT,
    STEP_DOES_NOT_FIT,
    WEIGHTS_DO_NOT_FIT,
    translate_xla_errors,
)
from fairkv_jax.plan import Plan, route
from fairkv_jax.prefill import (
    CompressedPrefix,
    PrefillCarry,
    compress_layer,
    insert,
    num_chunks,
    release,
    run_chunks,
    score_prompt,
    split_at_layers,
    start_prefill,
)
from fairkv_jax.sampling import Sampled, SamplingState, TokenHistory, mask_words, sample_first
from fairkv_jax.sharding.load_weights import load_model
from fairkv_jax.sharding.mesh import compiler_options, make_mesh
from fairkv_jax.sharding.slots import SlotLayout

MIN_PREFILL_BUCKET = 32
_SCORE_BLOCK = 128
"""Prompt tokens whose logits are there at a time."""


@dataclass
class PrefillTask:
    """A prompt on its way through the layers, in units: see `fairkv_jax.prefill`."""

    num_tokens: int
    token_ids: np.ndarray
    """Padded to the bucket."""
    budgets: np.ndarray
    """[L, K] tokens."""
    method: int
    """Index of its method among the engine's."""
    layer_units: int
    num_units: int
    """Those of the layers, and the blocks of the prompt whose log-probabilities are wanted."""
    state: PrefillCarry
    done: int = 0
    """Units so far."""
    scores: list[Sampled] = field(default_factory=list)
    """Of each block, as `score_prompt` gives them; perhaps not computed yet."""

    @property
    def bucket(self) -> int:
        return len(self.token_ids)

    @property
    def keeps_whole(self) -> bool:
        """Whether the prompt is within the budget of every head."""
        return bool((self.budgets >= self.num_tokens).all())

    @property
    def is_done(self) -> bool:
        return self.done == self.num_units

    @property
    def prefix(self) -> CompressedPrefix:
        """The compressed cache; whole when the prefill is done."""
        return self.state.prefix


@dataclass(frozen=True)
class Placement:
    """Where a prefix goes: kept tokens of the slots that own the row, [L, P*C], others 0."""

    lengths: np.ndarray
    missing_pages: np.ndarray
    """[P] pages by which the devices fall short of it, those of its next tokens included."""


class Engine:
    """Runs one model on a mesh, its KV heads laid out by a plan.

    Raises:
        ValueError: the devices, the policy or the pool's size do not fit the configuration.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        config: EngineConfig,
        kv_config: KVConfig,
        *,
        progress: bool = True,
    ):
        self.model_config = checkpoint.config
        self.plan, self.config, self.kv_config = plan, config, kv_config
        self.methods = offered_methods(kv_config)
        self.layout = SlotLayout.from_plan(plan)
        self.mesh = make_mesh(config.tensor_parallel_size)
        self.book = self._make_book()
        int8 = config.quantization == "int8"
        with translate_xla_errors("loading the weights", WEIGHTS_DO_NOT_FIT):
            model = load_model(
                checkpoint, self.layout, self.mesh, config.dtype, int8=int8, progress=progress
            )
            self.model = jax.block_until_ready(model)
        self._progress = progress
        self._programs: dict[tuple[str, int], Compiled] = {}
        self.cache = self._empty_cache()

    def start_prefill(
        self,
        token_ids: list[int],
        kv_config: KVConfig | None = None,
        *,
        wants_logprobs: bool = False,
    ) -> PrefillTask:
        """Begins a prompt, to be kept as the engine keeps them or in another way that it allows.

        `wants_logprobs`: those of the prompt's own tokens, see `PrefillTask.scores`.
        """
        kv_config = kv_config or self.kv_config
        num_tokens = len(token_ids)
        bucket = prefill_bucket(num_tokens, self.config.max_model_len)
        padded = np.zeros(bucket, np.int32)
        padded[:num_tokens] = token_ids
        budgets = budgets_per_head(kv_config, num_tokens, *self._heads)
        layer_units = num_chunks(self.model_config.num_layers, num_tokens, self._block(bucket))
        blocks = -(-(num_tokens - 1) // _score_block(bucket)) if wants_logprobs else 0
        return PrefillTask(
            num_tokens,
            padded,
            np.array(budgets, np.int32),
            self.methods.index(make_method(kv_config)),
            layer_units,
            layer_units + blocks,
            self._start_program(bucket)(self.model, padded),
        )

    def advance_prefill(self, prefill: PrefillTask, units: int) -> None:
        """Runs that many units more of a prefill, or all that are left; the pool is not touched."""
        stop = min(prefill.done + units, prefill.num_units)
        of_layers = min(stop, prefill.layer_units)
        self._run_chunks(prefill, of_layers)
        for _ in range(max(prefill.done, of_layers), stop):
            self._score(prefill)
        prefill.done = stop

    def _run_chunks(self, prefill: PrefillTask, stop: int) -> None:
        """Runs a prefill's chunks up to `stop`, and compresses the layers that this completes."""
        length, method = np.int32(prefill.num_tokens), np.int32(prefill.method)
        slots = self.layout.head_of_slot, self.layout.first_slot
        keeps_whole = prefill.keeps_whole
        per_layer = prefill.layer_units // self.model_config.num_layers
        for start, end, layer in split_at_layers(
            prefill.done, stop, per_layer, keeps_whole=keeps_whole
        ):
            program = self._chunks_program(prefill.bucket, prefill.state)
            chunks = np.int32(start), np.int32(end)
            prefill.state = program(
                self.model, prefill.state, length, method, np.bool_(keeps_whole), chunks, *slots
            )
            if layer is not None:
                program = self._compress_program(prefill.bucket, prefill.state)
                prefill.state = program(
                    prefill.state, np.int32(layer), length, prefill.budgets, method, *slots
                )

    def units_of(self, prefill: PrefillTask, work: float) -> int:
        """Units, from where a prefill stands, of that much work in multiply-adds; at least one."""
        return max(1, int(np.searchsorted(np.cumsum(self._work(prefill)), work, side="right")))

    def work_of(self, prefill: PrefillTask, units: int) -> float:
        """Multiply-adds of the next units of a prefill."""
        return float(self._work(prefill)[:units].sum())

    def prefill(self, token_ids: list[int], kv_config: KVConfig | None = None) -> CompressedPrefix:
        """Runs a prompt through the model and compresses its cache, all at once."""
        prefill = self.start_prefill(token_ids, kv_config)
        self.advance_prefill(prefill, prefill.num_units)
        return prefill.prefix

    def prompt_scores(self, prefill: PrefillTask) -> Sampled:
        """How likely the prompt's tokens but the first were, of a prefill that was asked for it.

        On the host; a leading axis of `num_tokens` - 1.
        """
        block, last = _score_block(prefill.bucket), prefill.num_tokens - 1
        blocks: list[Sampled] = jax.device_get(prefill.scores)
        starts = [self._score_start(prefill, i) for i in range(len(blocks))]

        def join(*parts: np.ndarray) -> np.ndarray:
            joined = np.empty((last, *parts[0].shape[1:]), parts[0].dtype)
            for start, part in zip(starts, parts, strict=True):
                joined[start : start + block] = part[: last - start]
            return joined

        return jax.tree.map(join, *blocks)

    def sample_first(
        self,
        prefix: CompressedPrefix,
        sampling: SamplingState,
        token_ids: list[int],
        allowed: np.ndarray | None = None,
    ) -> Sampled:
        """Samples the token that follows a prompt, for one row's options.

        `allowed` are the words of a guided row's mask, see `sample`.
        """
        if allowed is None:
            allowed = np.zeros(mask_words(self.model_config.vocab_size), np.uint32)
        return self._sample_program(sampling)(
            prefix.logits,
            sampling,
            TokenHistory(self._padded(token_ids)[None], np.array([len(token_ids)], np.int32)),  # pyright: ignore[reportArgumentType]
            allowed[None],
        )

    def place(self, prefix: CompressedPrefix, known_tokens: int = 0) -> Placement:
        """Routes a prefix's heads to their replicas, by the load of the devices at this moment.

        `known_tokens` will be appended to it in any case: it needs pages for them too.
        """
        head_lengths = np.asarray(prefix.head_lengths)
        owner = route(self.layout.replicas, head_lengths, self.book.load)
        slots = np.take_along_axis(self.layout.slot_of_head, owner[..., None], -1)[..., 0]
        lengths = np.zeros(self.layout.head_of_slot.shape, np.int32)
        np.put_along_axis(lengths, slots, head_lengths, axis=1)
        grown = lengths + (lengths > 0) * (1 + known_tokens)
        needed = self.book.pages_for(grown) + self.book.growth
        missing = np.maximum(needed - self.book.free_pages, 0)
        return Placement(lengths, missing)

    def insert(
        self, prefix: CompressedPrefix, row: int, placement: Placement, token_ids: list[int]
    ) -> None:
        """Copies a prefix into an empty row, for which the placement has found pages.

        `token_ids` are the prompt's and all that has been generated, the first one at least.
        """
        self.book.insert(row, placement.lengths)
        where = (np.int32(row), self.book.page_table[:, row], placement.lengths)
        self.cache = self._insert_program(prefix)(
            self.cache, prefix, *where, self._padded(token_ids), np.int32(len(token_ids))
        )

    def release(self, row: int) -> None:
        """Frees a row and its pages."""
        self.book.release(row)
        lengths = self._release_program()(self.cache.lengths, np.int32(row))
        self.cache = replace(self.cache, lengths=lengths)

    def generate(self, rows: DecodeInputs, num_steps: int = 1) -> Sampled:
        """Appends the last tokens of the first rows of the batch and samples their next ones.

        So `num_steps` times; what was sampled has a leading axis of steps, see `decode_step`. The
        caller has seen that no pages are missing (`book.missing_pages`).
        """
        new_pages = self.book.grow(num_steps)[:, : len(rows.positions)]
        program = self._decode_program(rows)
        self.cache, sampled = program(self.model, self.cache, rows, new_pages, np.int32(num_steps))
        return sampled

    def on_all_devices(self, arrays: Any) -> Any:
        """A pytree of arrays, copied to every device: what several steps read, they find there."""
        return jax.device_put(arrays, NamedSharding(self.mesh, PartitionSpec()))

    def reset(self) -> None:
        """Starts over with an empty cache; nobody owns a row any more."""
        for array in jax.tree.leaves(self.cache):
            array.delete()  # there is no room for two
        self.book = self._make_book()
        self.cache = self._empty_cache()

    def warm_up(
        self, prompt_lengths: Iterable[int], num_rows: int, *, prompt_logprobs: bool = True
    ) -> None:
        """Compiles what prompts of these lengths and a batch of up to `num_rows` rows run.

        `prompt_logprobs`: also what tells how likely the prompts were.
        """
        longest = self.config.max_model_len
        prefills = sorted({prefill_bucket(length, longest) for length in prompt_lengths})
        batches = sorted({self.batch_bucket(rows + 1) for rows in range(num_rows)})
        by_prefill = ("prefill", "score") if prompt_logprobs else ("prefill",)
        needed = [*product(by_prefill, prefills), *product(["decode"], batches)]
        if all(key in self._programs for key in needed):
            return
        total = (3 + len(by_prefill)) * len(prefills) + len(batches) + 2
        with CompilingBar(total, show=self._progress) as compiled:
            for bucket in prefills:
                prompt = f"prompts of {bucket}"
                state = compiled(prompt, self._start_program, bucket).out_info
                compiled(prompt, self._chunks_program, bucket, state)
                compiled(prompt, self._compress_program, bucket, state)
                compiled(prompt, self._insert_program, state.prefix)
                if prompt_logprobs:
                    compiled(prompt, self._score_program, bucket, state)
            compiled("a row", self._release_program)
            first = idle_inputs(1, self.model_config.vocab_size).sampling
            compiled("a row", self._sample_program, first)
            for batch in batches:
                rows = idle_inputs(batch, self.model_config.vocab_size)
                compiled(f"{batch} rows", self._decode_program, rows)

    @property
    def _heads(self) -> tuple[int, int]:
        """Layers and KV heads."""
        return self.model_config.num_layers, self.model_config.num_kv_heads

    def _empty_cache(self) -> KVCache:
        with translate_xla_errors("making the KV pool", POOL_DOES_NOT_FIT):
            cache = KVCache.empty(
                self.mesh, self.book, self.model_config.head_dim, self.config.dtype
            )
            return jax.block_until_ready(cache)

    def _work(self, prefill: PrefillTask) -> np.ndarray:
        """Multiply-adds of each unit that is left: of a layer's weights, and of its attention."""
        model, block = self.model_config, self._block(prefill.bucket)
        heads = model.num_heads * model.head_dim
        weights = 2 * model.hidden_size * heads * (1 + 1 / model.group_size)
        weights += 3 * model.hidden_size * model.intermediate_size
        blocks = prefill.layer_units // model.num_layers
        past = (np.arange(prefill.layer_units) % blocks + 0.5) * block
        logits = _score_block(prefill.bucket) * model.hidden_size * model.vocab_size
        scores = np.full(prefill.num_units - prefill.layer_units, float(logits))
        return np.concatenate([block * (weights + 2 * heads * past), scores])[prefill.done :]

    def _score(self, prefill: PrefillTask) -> None:
        """Runs the next block of a prompt's log-probabilities."""
        start = self._score_start(prefill, len(prefill.scores))
        program = self._score_program(prefill.bucket, prefill.state)
        scores = program(self.model, prefill.state.hidden, prefill.token_ids, np.int32(start))
        prefill.scores.append(scores)

    def _score_start(self, prefill: PrefillTask, index: int) -> int:
        """Where a block begins; the last one may reach back into the one before it."""
        block = _score_block(prefill.bucket)
        return min(index * block, prefill.state.hidden.shape[0] - block)

    def _padded(self, token_ids: list[int]) -> np.ndarray:
        """Tokens of a row, as long as any may be."""
        padded = np.zeros(self.book.max_tokens, np.int32)
        padded[: len(token_ids)] = token_ids
        return padded

    def _block(self, bucket: int) -> int:
        """Tokens of a unit of such a prefill."""
        return min(self.config.prefill_chunk_size, bucket)

    def _start_program(self, bucket: int) -> Compiled:
        return self._program(
            ("prefill", bucket),
            start_prefill,
            self.model,
            jax.ShapeDtypeStruct((bucket,), jnp.int32),
            mesh=self.mesh,
            chunk_size=self._block(bucket),
            methods=self.methods,
            packed_size=max_kept_per_layer(self.kv_config, bucket, *self._heads),
        )

    def _chunks_program(self, bucket: int, state: PrefillCarry) -> Compiled:
        number = np.int32(0)
        return self._program(
            ("chunks", bucket),
            run_chunks,
            self.model,
            state,
            number,
            number,
            np.bool_(False),
            (number, number),
            self.layout.head_of_slot,
            self.layout.first_slot,
            mesh=self.mesh,
            methods=self.methods,
            chunk_size=self._block(bucket),
        )

    def _compress_program(self, bucket: int, state: PrefillCarry) -> Compiled:
        number = np.int32(0)
        return self._program(
            ("compress", bucket),
            compress_layer,
            state,
            number,
            number,
            jax.ShapeDtypeStruct(self._heads, jnp.int32),
            number,
            self.layout.head_of_slot,
            self.layout.first_slot,
            mesh=self.mesh,
            methods=self.methods,
        )

    def _score_program(self, bucket: int, state: PrefillCarry) -> Compiled:
        return self._program(
            ("score", bucket),
            score_prompt,
            self.model,
            state.hidden,
            jax.ShapeDtypeStruct((bucket,), jnp.int32),
            np.int32(0),
            mesh=self.mesh,
            block=_score_block(bucket),
        )

    def _insert_program(self, prefix: CompressedPrefix) -> Compiled:
        layers, slots = self.layout.head_of_slot.shape
        table = jax.ShapeDtypeStruct((layers, slots, self.book.max_pages), jnp.int32)
        lengths = jax.ShapeDtypeStruct((layers, slots), jnp.int32)
        token_ids = jax.ShapeDtypeStruct((self.book.max_tokens,), jnp.int32)
        number = np.int32(0)
        args = (self.cache, prefix, number, table, lengths, token_ids, number)
        return self._program(("insert", prefix.k.shape[1]), insert, *args, mesh=self.mesh)

    def _release_program(self) -> Compiled:
        return self._program(("release", 1), release, self.cache.lengths, np.int32(0))

    def _sample_program(self, sampling: SamplingState) -> Compiled:
        whole = NamedSharding(self.mesh, PartitionSpec())
        shape = (self.model_config.vocab_size,)
        logits = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=whole)
        tokens = jax.ShapeDtypeStruct((1, self.book.max_tokens), jnp.int32)
        seen = TokenHistory(tokens, jax.ShapeDtypeStruct((1,), jnp.int32))  # pyright: ignore[reportArgumentType]
        allowed = jax.ShapeDtypeStruct((1, mask_words(*shape)), jnp.uint32)
        return self._program(("sample", 1), sample_first, logits, sampling, seen, allowed)

    def _decode_program(self, rows: DecodeInputs) -> Compiled:
        layers, slots = self.layout.head_of_slot.shape
        batch = len(rows.positions)
        new_pages = jax.ShapeDtypeStruct((layers, batch, slots), jnp.int32)
        args = (self.model, self.cache, rows, new_pages, np.int32(1))
        return self._program(
            ("decode", batch),
            decode_step,
            *args,
            mesh=self.mesh,
            attention_backend=self.config.attention_backend,
        )

    def _program(self, key: tuple[str, int], step: Any, *args: Any, **static: Any) -> Compiled:
        """The compiled step of that shape; compiled now if it is the first call."""
        if key not in self._programs:
            # GPUs would round the factors of float32 products to ten bits.
            precision = "highest" if self.config.dtype == "float32" else None
            compiling = translate_xla_errors(f"compiling {key[0]} of {key[1]}", STEP_DOES_NOT_FIT)
            with jax.default_matmul_precision(precision), compiling:
                lowered = step.lower(*args, **static)
                options = compiler_options(self.mesh, int8=self.config.quantization == "int8")
                self._programs[key] = lowered.compile(compiler_options=options)
        return self._programs[key]

    @property
    def num_programs(self) -> int:
        """Programs compiled so far."""
        return len(self._programs)

    def batch_bucket(self, num_rows: int) -> int:
        """The compiled batch that holds the first `num_rows` rows."""
        return min(next_power_of_two(num_rows), self.config.max_num_seqs)

    @property
    def kv_capacity_tokens(self) -> int:
        """Tokens of a sequence, in all its layers and heads, that the pool holds uncompressed."""
        heads = self.model_config.num_layers * self.model_config.num_kv_heads
        pages = self.book.pages_per_device * self.book.num_devices
        return pages * self.book.page_size // heads

    def _make_book(self) -> PageBook:
        """Sizes the pool: all that the configuration grants, but no more than the rows can fill."""
        config, model = self.config, self.model_config
        itemsize = jnp.dtype(config.dtype).itemsize
        page_bytes = 2 * config.page_size * model.head_dim * itemsize
        granted = config.kv_cache_bytes // (page_bytes * config.tensor_parallel_size)
        slots = self.layout.replicas.sum((0, 1))
        one_row = int(slots.max()) * -(-config.max_model_len // config.page_size)
        if granted < one_row:
            need = one_row * page_bytes * config.tensor_parallel_size
            raise ValueError(
                f"a pool of {config.kv_cache_bytes / 2**20:.0f} MiB cannot hold one request of "
                f"max_model_len {config.max_model_len}, which may need {need / 2**20:.0f} MiB: "
                "raise kv_cache_memory_bytes or lower max_model_len"
            )
        return PageBook(
            num_layers=model.num_layers,
            num_rows=config.max_num_seqs,
            num_devices=config.tensor_parallel_size,
            slots_per_device=self.layout.slots_per_device,
            pages_per_device=min(granted, one_row * config.max_num_seqs),
            page_size=config.page_size,
            max_tokens=config.max_model_len,
        )


def prefill_bucket(num_tokens: int, max_tokens: int) -> int:
    """The compiled prompt length that holds `num_tokens`."""
    return min(max(next_power_of_two(num_tokens), MIN_PREFILL_BUCKET), max_tokens)


def _score_block(bucket: int) -> int:
    """Prompt tokens of such a bucket whose logits are there at a time."""
    return min(_SCORE_BLOCK, bucket)


def next_power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
