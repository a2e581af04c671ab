"""Builds an engine from the options that `LLM` and `python -m fairkv_jax.serve` accept.

options ──► configurations ──► checkpoint ──► plan ⇄ memory and batch size ──► LLMEngine
└──────────── prepare ──────────────────┘
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from fairkv_jax.checkpoint import Checkpoint, open_checkpoint
from fairkv_jax.checkpoint.fetch import DEMO_MODEL
from fairkv_jax.compress.budgets import MaxKept, check_least_kept
from fairkv_jax.compress.registry import make_decode_method, make_method
from fairkv_jax.config import (
    DTYPES,
    ENGINE_CLASSES,
    ENGINE_OPTIONS,
    BuildOptions,
    EngineConfig,
    GrammarLimits,
    KVConfig,
    ModelConfig,
)
from fairkv_jax.engine.head_plan import choose_plan
from fairkv_jax.engine.llm_engine import LLMEngine
from fairkv_jax.engine.model_runner import ModelRunner
from fairkv_jax.engine.schedule_log import Header, ScheduleLog
from fairkv_jax.kv_cache_spec import token_bytes
from fairkv_jax.models.params import device_bytes
from fairkv_jax.options import split_options, with_new_names
from fairkv_jax.pallas.ragged_decode import check_backend
from fairkv_jax.pallas.ragged_decode.pieces import MAX_PAIRS
from fairkv_jax.plan import HeadScores, ModelShape, Plan, Profile, shipped_head_scores

_CPU_KV_BYTES = 1 << 30
_PREFILL_CHUNK_SIZES = {"cpu": 128}
_DEFAULT_PREFILL_CHUNK_SIZE = 1024
"""On CPUs short chunks cost no throughput, and other requests wait less between decode steps."""
_CPU_ROWS = 8
_GPU_ROWS = 256
_ROW_TOKENS = 512
"""Tokens that the pool must be able to hold for each row of the default batch."""


@dataclass(frozen=True)
class Preparation:
    """What the options of an engine say before its heads are planned."""

    checkpoint: Checkpoint
    build_options: BuildOptions
    engine_config: EngineConfig
    """Without the sizes of the pool and of the batch, unless they were given."""
    kv_config: KVConfig
    grammar_limits: GrammarLimits
    given: frozenset[str]
    """The fields of `engine_config` that were given."""


def prepare(model: str | Path | None, options: Mapping[str, Any]) -> Preparation:
    """Reads the options of an engine and opens its checkpoint; see `build_engine`."""
    values = {"model": model, **options}
    for_build, for_engine, for_kv, for_grammars = split_options(values, *ENGINE_CLASSES)
    build_options, grammar_limits = BuildOptions(**for_build), GrammarLimits(**for_grammars)
    kv_config = _kv_config(for_kv)
    _check_names(for_engine)
    checkpoint = open_checkpoint(build_options.model or DEMO_MODEL, build_options.download_dir)
    kv_config = _with_head_scores(kv_config, checkpoint, for_engine.get("max_model_len"))
    _check_head_budgets(kv_config, checkpoint.config)
    engine_config = _engine_config(for_engine, checkpoint.config, jax.default_backend())
    return Preparation(
        checkpoint, build_options, engine_config, kv_config, grammar_limits, frozenset(for_engine)
    )


def build_engine(
    model: str | Path | None = None,
    *,
    progress: bool = True,
    memory_bytes: int | None = None,
    make_runner: Callable[..., ModelRunner] = ModelRunner,
    **options: Any,
) -> LLMEngine:
    """Opens a checkpoint, plans its heads, and loads it onto the devices.

    Args:
        model: the checkpoint; see `BuildOptions.model`. None: the demo model.
        progress: whether to show a progress bar while weights are loaded.
        memory_bytes: what XLA may take of each device. None: of the smallest of this process.
        make_runner: takes the arguments of `ModelRunner`.
        options: the options that the classes of `ENGINE_CLASSES` declare, by the names that users
            write; `LLM` lists them.

    Raises:
        TypeError: an option is unknown.
        ValueError: an option is out of its limits, the checkpoint cannot be read, or the schedule
            log cannot be written.
    """
    options = with_new_names(options, ENGINE_OPTIONS, stacklevel=2)
    ready = prepare(model, options)
    checkpoint, build_options, kv_config = ready.checkpoint, ready.build_options, ready.kv_config
    if make_runner is ModelRunner and jax.process_count() > 1:
        raise ValueError(
            f"JAX runs over {jax.process_count()} processes: start each of them with "
            "python -m fairkv_jax.serve --num-hosts"
        )
    plan, engine_config = _plan_and_size(ready, memory_bytes or device_memory_bytes())
    log = None
    if build_options.schedule_log is not None:
        header = Header.of(
            build_options.model or DEMO_MODEL,
            checkpoint,
            plan,
            engine_config,
            kv_config,
            has_prompts=build_options.schedule_log_prompts,
            platform=jax.default_backend(),
        )
        log = ScheduleLog(build_options.schedule_log, header)
    return LLMEngine(
        checkpoint,
        plan,
        engine_config,
        kv_config,
        grammar_limits=ready.grammar_limits,
        progress=progress,
        schedule_log=log,
        make_runner=make_runner,
    )


def device_memory_bytes() -> int | None:
    """Returns what XLA may take of the smallest device of this process; None on CPUs."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    return min((each["bytes_limit"] for each in stats if each), default=None)


def default_max_num_seqs(
    platform: str, slots_per_device: int, pool_tokens: int, max_model_len: int
) -> int:
    """Returns the default number of rows of the decode batch.

    It is small on CPUs, where every row costs time. On GPUs it is 256, or fewer if the decode
    kernels take no more (row, slot) pairs, or if the pool cannot hold 512 tokens per row.

    Args:
        slots_per_device: head slots per layer and device.
        pool_tokens: tokens that the pool can hold, each in all layers and KV heads.
    """
    if platform == "cpu":
        return _CPU_ROWS
    rows_held = pool_tokens // min(_ROW_TOKENS, max_model_len)
    return max(1, min(_GPU_ROWS, MAX_PAIRS // slots_per_device, rows_held))


def resolved_dtype(dtype: str, platform: str) -> str:
    """Returns the type that `auto` stands for on a platform, and any other type as it is."""
    if dtype != "auto":
        return dtype
    return "float32" if platform == "cpu" else "bfloat16"


def _kv_config(fields: dict[str, Any]) -> KVConfig:
    """Makes the KV configuration; a wrong one is refused before anything is loaded."""
    budgets, scores = fields.get("head_budgets"), fields.get("head_scores")
    read = {
        "head_budgets": None if budgets is None else _head_budgets(budgets),
        "head_scores": None if scores is None else _head_scores(scores),
    }
    kv_config = KVConfig(**{**fields, **read})
    make_method(kv_config)
    make_decode_method(kv_config)
    return kv_config


def _check_names(fields: dict[str, Any]) -> None:
    """Refuses an unknown attention backend or dtype before anything is loaded."""
    check_backend(fields.get("attention_backend", EngineConfig.attention_backend))
    dtype = fields.get("dtype", "auto")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")


def _engine_config(fields: dict[str, Any], config: ModelConfig, platform: str) -> EngineConfig:
    """Makes the engine's configuration; `_plan_and_size` replaces the pool and batch sizes."""
    chosen = {
        "max_model_len": config.max_position_embeddings,
        "max_num_seqs": _CPU_ROWS if platform == "cpu" else _GPU_ROWS,
        "prefill_chunk_size": _PREFILL_CHUNK_SIZES.get(platform, _DEFAULT_PREFILL_CHUNK_SIZE),
        **fields,
    }
    chosen["dtype"] = resolved_dtype(fields.get("dtype", "auto"), platform)
    engine_config = EngineConfig(**chosen)
    if engine_config.max_model_len > config.max_position_embeddings:
        raise ValueError(
            f"max_model_len {engine_config.max_model_len} is beyond the model's context "
            f"{config.max_position_embeddings}"
        )
    return engine_config


def _plan_and_size(ready: Preparation, memory_bytes: int | None) -> tuple[Plan, EngineConfig]:
    """Returns the plan, and the configuration with the sizes of the pool and the batch.

    The plan depends on the batch size, and both sizes depend on the slots that the plan needs.
    Planning therefore starts with the largest default batch, and repeats if it does not fit.

    Args:
        memory_bytes: what XLA may take of the smallest device; None: unknown.
    """
    checkpoint, build_options, kv_config = ready.checkpoint, ready.build_options, ready.kv_config
    engine_config = ready.engine_config
    while True:
        plan = choose_plan(checkpoint, build_options, engine_config, kv_config)
        if "kv_cache_bytes" not in ready.given:
            num_bytes = _CPU_KV_BYTES
            if memory_bytes is not None:
                taken_bytes = _taken_bytes(checkpoint.config, plan, engine_config, kv_config)
                utilization = build_options.gpu_memory_utilization
                num_bytes = _kv_bytes(
                    taken_bytes, plan.num_devices, memory_bytes, utilization, kv_config
                )
            engine_config = replace(engine_config, kv_cache_bytes=num_bytes)
        if "max_num_seqs" in ready.given:
            return plan, engine_config
        rows = default_max_num_seqs(
            jax.default_backend(),
            plan.slots,
            engine_config.kv_cache_bytes // _token_bytes(checkpoint.config, engine_config),
            engine_config.max_model_len,
        )
        if rows >= engine_config.max_num_seqs:
            return plan, engine_config
        engine_config = replace(engine_config, max_num_seqs=rows)


def _head_budgets(source: str | Path | Profile) -> tuple[tuple[int, ...], ...]:
    """Returns a profile's tokens, rounded, as the budgets of its heads."""
    profile = source
    if not isinstance(profile, Profile):
        if not Path(profile).is_file():
            raise ValueError(
                f"kv_head_budgets {str(source)!r} is not a file: give a head profile in JSON"
            )
        profile = Profile.from_json(Path(profile).read_text(encoding="utf-8"))
    return tuple(tuple(max(1, round(tokens)) for tokens in layer) for layer in profile.tokens)


def _head_scores(source: str | Path | HeadScores) -> HeadScores:
    if isinstance(source, HeadScores):
        return source
    if not Path(source).is_file():
        raise ValueError(
            f"kv_head_scores {str(source)!r} is not a file: give head scores in JSON, see "
            "python -m fairkv_jax.profile learn"
        )
    return HeadScores.from_json(Path(source).read_text(encoding="utf-8"))


def _with_head_scores(
    kv_config: KVConfig, checkpoint: Checkpoint, max_model_len: int | None
) -> KVConfig:
    """Returns the options with the model's own head scores, where they are needed and not given.

    Raises:
        ValueError: there are none, they are another model's, or not even the longest prompt has
            as much to keep as every head keeps.
    """
    if not kv_config.uses_head_scores:
        return kv_config
    scores = kv_config.head_scores or checkpoint.head_scores or shipped_head_scores(checkpoint.name)
    if scores is None:
        raise ValueError(
            f"kv_allocator {kv_config.allocator_name!r} needs head scores, and {checkpoint.name} "
            "has none: learn them with python -m fairkv_jax.profile learn, and give the file as "
            "kv_head_scores"
        )
    config = checkpoint.config
    scores.check_model(config.num_layers, config.num_kv_heads, checkpoint.name)
    kv_config = replace(kv_config, head_scores=scores)
    check_least_kept(kv_config, max_model_len or config.max_position_embeddings)
    return kv_config


def _check_head_budgets(kv_config: KVConfig, config: ModelConfig) -> None:
    """Raises ValueError if a table of budgets does not have the model's layers and heads."""
    table = kv_config.head_budgets
    needs = (config.num_layers, config.num_kv_heads)
    if table is not None and (len(table), len(table[0])) != needs:
        raise ValueError(
            f"kv_head_budgets is a table of {len(table)} x {len(table[0])}, but the model has "
            f"{needs[0]} layers x {needs[1]} KV heads"
        )


def _taken_bytes(
    config: ModelConfig, plan: Plan, engine_config: EngineConfig, kv_config: KVConfig
) -> int:
    """Returns the bytes of the weights and of the longest prefill, over all devices."""
    itemsize = jnp.dtype(engine_config.dtype).itemsize
    weights = device_bytes(
        config,
        plan.slots,
        plan.num_devices,
        itemsize,
        int8=engine_config.quantization == "int8",
    )
    shape = ModelShape.from_config(config)
    prefill = _prefill_bytes(shape, kv_config, engine_config.max_model_len, itemsize)
    return plan.num_devices * (sum(weights.values()) + prefill)


def _prefill_bytes(
    shape: ModelShape, kv_config: KVConfig, max_model_len: int, itemsize: int
) -> int:
    """Returns the bytes per device that the longest prefill carries from chunk to chunk.

    These are the compressed prefix, the hidden states, the keys and values of one layer twice,
    because packing reads all of them, and the scores of the layer's keys. A method that lets the
    model repeat the prompt keeps the whole prompt until then, and the scores of all layers.
    """
    heads = (shape.num_layers, shape.num_kv_heads)
    kept = MaxKept.of(kv_config, max_model_len, *heads)
    packed = kept.in_all_layers + kept.in_one_layer
    prefix = 2 * packed * shape.head_dim * itemsize
    keys = 2 * 2 * shape.num_kv_heads * shape.head_dim * itemsize
    scores = 3 * 4 * shape.num_heads * kv_config.window
    if kv_config.repeats_prompt:
        prefix *= 2  # what is kept is packed beside the whole prompt
        scores += 2 * 4 * shape.num_layers * shape.num_heads
    return prefix + max_model_len * (shape.hidden_size * itemsize + keys + scores)


def _kv_bytes(
    taken_bytes: int, num_devices: int, memory_bytes: int, utilization: float, kv_config: KVConfig
) -> int:
    """Returns the bytes of the pool over all devices: what is left of `memory_bytes` on each.

    Raises:
        ValueError: no memory is left.
    """
    granted = int(memory_bytes * utilization) * num_devices
    if granted <= taken_bytes:
        whole = ""
        if kv_config.repeats_prompt:
            whole = f"{kv_config.scorer_name} keeps the longest prompt whole until it is repeated: "
        raise ValueError(
            f"{whole}weights and prefill need {taken_bytes / 2**30:.1f} GiB, but "
            f"gpu_memory_utilization {utilization} grants {granted / 2**30:.1f} GiB over "
            f"{num_devices} device(s): raise it, lower max_model_len, or use more devices"
        )
    return granted - taken_bytes


def _token_bytes(config: ModelConfig, engine_config: EngineConfig) -> int:
    """Returns the bytes of the keys and values of one token, in all layers and heads."""
    per_head = token_bytes(config.head_dim, engine_config.page_dtype)
    return config.num_layers * config.num_kv_heads * per_head
