"""The compiled programs of an engine: one per step and size, compiled at the first use or before.

The arguments of a step are declared beside its function, by a `lower_...` function; those of
`sample_first`, `release_rows`, `write_tables`, `copy_pages` and `replicate_pages` are declared
here.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.stages import Compiled, Lowered

from fairkv_jax.cache import (
    REPLICATED_AT_ONCE,
    copy_pages,
    release_rows,
    replicate_pages,
    write_tables,
)
from fairkv_jax.compress.budgets import MaxKept
from fairkv_jax.compress.contract import Method
from fairkv_jax.compress.instruction import RepeatInstruction
from fairkv_jax.compress_layer import lower_compress_layer
from fairkv_jax.compress_prompt import lower_compress_prompt
from fairkv_jax.compress_row import lower_compress_row
from fairkv_jax.config import EngineConfig, KVConfig
from fairkv_jax.decode import (
    abstract_table_writes,
    idle_inputs,
    lower_decode_step,
    max_table_writes,
)
from fairkv_jax.engine.compiling import compile_all
from fairkv_jax.engine.device_errors import STEP_DOES_NOT_FIT, translate_xla_errors
from fairkv_jax.engine.prefill_chunking import (
    Packing,
    chunk_size_of,
    logprobs_block,
    prefill_bucket,
)
from fairkv_jax.insert import lower_insert
from fairkv_jax.prefill import lower_logits_at, lower_run_chunks, lower_score_prompt
from fairkv_jax.prefill_carry import PrefillShapes, lower_gather_kept, lower_start_prefill
from fairkv_jax.repeat_prompt import lower_repeat_chunks, lower_start_repetition
from fairkv_jax.sampling import TokenHistory, sample_first
from fairkv_jax.shapes import TENSOR_AXIS
from fairkv_jax.sharding.mesh import compiler_options
from fairkv_jax.sharding.step_shapes import StepShapes


class Programs:
    """Compiles and keeps the programs that requests run."""

    def __init__(
        self,
        shapes: StepShapes,
        config: EngineConfig,
        kv_config: KVConfig,
        methods: tuple[Method, ...],
        instruction: RepeatInstruction | None,
        packing: Packing,
        decode_method: Method | None = None,
        row_buckets: Sequence[int] = (),
        *,
        show: bool,
    ):
        """Compiles nothing yet.

        Args:
            packing: which prompts are prefilled together.
            decode_method: how rows are compressed while they decode.
            row_buckets: the sizes of the programs that do it.
            show: whether to show a progress bar while many programs are compiled.
        """
        self._shapes, self._config, self._kv_config = shapes, config, kv_config
        self._methods, self._instruction, self._show = methods, instruction, show
        self._decode_method, self._row_buckets = decode_method, row_buckets
        self._compiled: dict[tuple[str, int], Compiled] = {}
        self.max_table_writes = max_table_writes(shapes)
        self._packing = packing

    @property
    def num_compiled(self) -> int:
        """Programs compiled so far."""
        return len(self._compiled)

    def warm_up(
        self,
        prompt_lengths: Iterable[int],
        batches: Iterable[int],
        *,
        suffix_lengths: Iterable[int] = (),
        prompt_logprobs: bool,
        forks: bool = False,
    ) -> None:
        """Compiles what prompts of these lengths and batches of these sizes run.

        Args:
            suffix_lengths: lengths of what follows prefixes in the cache.
            prompt_logprobs: also what computes the log-probabilities of the prompts.
            forks: also what lets rows begin with the prompt of another.
        """
        steps = [self.start_prefill, self.run_chunks, self.compress_layer, self.insert]
        if self._instruction is not None:
            steps += [self.start_repetition, self.repeat_chunks, self.compress_prompt]
        of_prompts = [*steps, *[self.score_prompt] * prompt_logprobs]
        if self._shapes.mesh.is_multi_process:
            of_prompts.append(self.gather_kept)
        suffix_buckets = self._buckets(suffix_lengths)
        prompt_buckets = self._buckets(prompt_lengths)
        packed_buckets = self._packed_buckets(prompt_lengths)
        of_packed = [self.start_prefill, self.run_chunks, self.insert]
        once = [self.sample_first, self.release_rows, self.write_tables]
        if suffix_buckets or forks:
            once.append(self.copy_pages)
            if self._shapes.layout.has_copies:
                once.append(self.replicate_pages)
        wanted = [(f"{n} rows", ("decode", n), partial(self.decode, n)) for n in batches]
        wanted += [
            (f"prompts of {n}", (step.__name__, n), partial(step, n))
            for n in prompt_buckets
            for step in of_prompts
        ]
        wanted += [
            (f"packed prompts of {n}", (step.__name__, n), partial(step, n))
            for n in packed_buckets
            for step in [*(of_packed if n not in prompt_buckets else ()), self.logits_at]
        ]
        wanted += [
            (
                f"suffixes of {n}",
                (_with_prefix(step.__name__), n),
                partial(step, n, has_prefix=True),
            )
            for n in suffix_buckets
            for step in steps
        ]
        wanted += [(step.__name__, (step.__name__, 0), step) for step in once]
        wanted += [
            (f"rows of {n} tokens", ("compress_row", n), partial(self.compress_row, n))
            for n in self._row_buckets
        ]
        missing = [(name, make) for name, key, make in wanted if key not in self._compiled]
        if missing:
            compile_all(missing[::-1], show=self._show)  # the largest take the longest

    def _buckets(self, lengths: Iterable[int]) -> list[int]:
        return sorted({prefill_bucket(length, self._config) for length in lengths})

    def _packed_buckets(self, lengths: Iterable[int]) -> list[int]:
        """The sizes of packed prompts of such lengths; none where no two fit."""
        least, most = 2 * min(lengths, default=0), self._packing.max_tokens
        if not least or self._packing.max_prompts == 1:
            return []
        return self._buckets(range(least, most + 1))

    def decode(self, batch: int) -> Compiled:
        """`decode_step` of the first `batch` rows."""
        backend = self._config.attention_backend
        return self._get("decode", batch, lambda: lower_decode_step(self._shapes, batch, backend))

    def start_prefill(self, bucket: int, *, has_prefix: bool = False) -> Compiled:
        """`start_prefill` of prompts of up to `bucket` tokens; so are the following.

        `has_prefix`: for suffixes of a prefix in the KV cache.
        """
        return self._get_prefill(
            "start_prefill", bucket, lower_start_prefill, has_prefix=has_prefix
        )

    def run_chunks(self, bucket: int, *, has_prefix: bool = False) -> Compiled:
        return self._get_prefill("run_chunks", bucket, lower_run_chunks, has_prefix=has_prefix)

    def compress_layer(self, bucket: int, *, has_prefix: bool = False) -> Compiled:
        return self._get_prefill(
            "compress_layer", bucket, lower_compress_layer, has_prefix=has_prefix
        )

    def start_repetition(self, bucket: int, *, has_prefix: bool = False) -> Compiled:
        return self._get_prefill(
            "start_repetition", bucket, lower_start_repetition, has_prefix=has_prefix
        )

    def repeat_chunks(self, bucket: int, *, has_prefix: bool = False) -> Compiled:
        return self._get_prefill(
            "repeat_chunks", bucket, lower_repeat_chunks, has_prefix=has_prefix
        )

    def compress_prompt(self, bucket: int, *, has_prefix: bool = False) -> Compiled:
        return self._get_prefill(
            "compress_prompt", bucket, lower_compress_prompt, has_prefix=has_prefix
        )

    def insert(self, bucket: int, *, has_prefix: bool = False) -> Compiled:
        return self._get_prefill("insert", bucket, lower_insert, has_prefix=has_prefix)

    def gather_kept(self, bucket: int) -> Compiled:
        return self._get_prefill("gather_kept", bucket, lower_gather_kept)

    def score_prompt(self, bucket: int) -> Compiled:
        lower = partial(lower_score_prompt, block=logprobs_block(bucket))
        return self._get_prefill("score_prompt", bucket, lower)

    def logits_at(self, bucket: int) -> Compiled:
        return self._get_prefill("logits_at", bucket, lower_logits_at)

    def compress_row(self, num_tokens: int) -> Compiled:
        """`compress_row` of rows of up to `num_tokens` tokens per head."""
        method, window = self._decode_method, self._kv_config.decode_window
        assert method is not None
        return self._get(
            "compress_row",
            num_tokens,
            lambda: lower_compress_row(self._shapes, num_tokens, method, window),
        )

    def sample_first(self) -> Compiled:
        """The first token of one row."""

        def lower() -> Lowered:
            shapes, spec = self._shapes, self._shapes.spec
            inputs = idle_inputs(1, shapes.config.vocab_size)
            history = TokenHistory(shapes.array((1, spec.max_tokens)), shapes.array((1,)))
            return shapes.lower(
                sample_first,
                shapes.array((shapes.config.vocab_size,), jnp.float32),
                jax.eval_shape(lambda: inputs.sampling),
                history,
                jax.eval_shape(lambda: inputs.grammar_bitmask),
            )

        return self._get("sample_first", 0, lower)

    def release_rows(self) -> Compiled:
        """`release_rows` of the cache's lengths."""
        rows = self._shapes.array((self._shapes.spec.num_rows,))
        return self._get(
            "release_rows",
            0,
            lambda: self._shapes.lower(release_rows, self._shapes.cache.lengths, rows),
        )

    def write_tables(self) -> Compiled:
        """`write_tables` of as many changes as one call takes."""
        shapes = self._shapes
        return self._get(
            "write_tables",
            0,
            lambda: shapes.lower(
                write_tables,
                shapes.cache.page_table,
                abstract_table_writes(shapes),
                mesh=shapes.mesh,
            ),
        )

    def copy_pages(self) -> Compiled:
        """`copy_pages` of at most one page of every (layer, slot)."""
        shapes = self._shapes
        size = (shapes.spec.num_devices, shapes.spec.num_layers * shapes.spec.slots_per_device)
        pages = shapes.array(size, spec=PartitionSpec(TENSOR_AXIS))
        return self._get(
            "copy_pages",
            0,
            lambda: shapes.lower(copy_pages, shapes.cache.pool, pages, pages, mesh=shapes.mesh),
        )

    def replicate_pages(self) -> Compiled:
        """`replicate_pages` of at most `REPLICATED_AT_ONCE` pages."""
        shapes = self._shapes
        pages = shapes.array(
            (shapes.spec.num_devices, REPLICATED_AT_ONCE), spec=PartitionSpec(TENSOR_AXIS)
        )
        return self._get(
            "replicate_pages",
            0,
            lambda: shapes.lower(
                replicate_pages, shapes.cache.pool, pages, pages, mesh=shapes.mesh
            ),
        )

    def _get_prefill(
        self,
        name: str,
        bucket: int,
        lower: Callable[[PrefillShapes], Lowered],
        *,
        has_prefix: bool = False,
    ) -> Compiled:
        """A program of prompts of up to `bucket` tokens, or of suffixes of that size."""
        model = self._shapes.config
        heads = model.num_layers, model.num_kv_heads
        shapes = PrefillShapes(
            self._shapes,
            bucket,
            chunk_size_of(bucket, self._config),
            self._methods,
            # A suffix may be kept whole, whatever the engine does with prompts.
            MaxKept.of(KVConfig() if has_prefix else self._kv_config, bucket, *heads),
            has_prefix,
            0 if self._instruction is None else self._instruction.max_part_length(bucket),
        )
        return self._get(_with_prefix(name) if has_prefix else name, bucket, lambda: lower(shapes))

    def _get(self, name: str, size: int, lower: Callable[[], Lowered]) -> Compiled:
        """The compiled program; compiled now if it is needed for the first time."""
        key = name, size
        if key not in self._compiled:
            int8 = self._config.quantization == "int8"
            options = compiler_options(self._shapes.mesh, int8=int8)
            doing = f"compiling {name} of {size}" if size else f"compiling {name}"
            with translate_xla_errors(doing, STEP_DOES_NOT_FIT):
                self._compiled[key] = lower().compile(compiler_options=options)
        return self._compiled[key]


def _with_prefix(name: str) -> str:
    """Returns the name of a program for suffixes of prefixes in the KV cache."""
    return f"{name} with a prefix"
