"""From options, as `LLM` and `serve` take them, to an engine."""

from pathlib import Path

import jax
import jax.numpy as jnp

from fairkv_jax.checkpoint import open_checkpoint
from fairkv_jax.checkpoint.fetch import DEMO_MODEL
from fairkv_jax.compress import make_policy
from fairkv_jax.config import EngineConfig, KVConfig, ModelConfig
from fairkv_jax.engine.llm_engine import LLMEngine
from fairkv_jax.plan import STRATEGIES, Plan, Profile, make_plan

DTYPES = ("auto", "float32", "bfloat16", "float16")
_CPU_KV_BYTES = 1 << 30


def build_engine(
    model: str | Path = DEMO_MODEL,
    *,
    tensor_parallel_size: int = 1,
    max_model_len: int | None = None,
    max_num_seqs: int = 8,
    dtype: str = "auto",
    seed: int = 0,
    kv_policy: str = "full",
    kv_budget: int | None = None,
    kv_ratio: float | None = None,
    kv_window: int = 32,
    kv_pool: str = "max",
    kv_kernel: int = 7,
    kv_pool_first: bool = False,
    kv_floor: str = "blend",
    kv_alpha: float = 0.2,
    head_plan: str | Path | Plan = "fair_copying",
    max_copies: int | None = None,
    page_size: int = 16,
    kv_cache_memory_bytes: int | None = None,
    gpu_memory_utilization: float = 0.9,
    progress: bool = True,
) -> LLMEngine:
    """Opens a checkpoint, plans its heads, loads it onto the devices.

    Args:
        model: a checkpoint's path, or the name of one under `checkpoints/`.
        max_model_len: most tokens of a request, prompt and output; None: the model's context.
        dtype: of weights and cache; "auto" is float32 on CPU and bfloat16 on GPUs.
        kv_policy and the other kv_ options: see `KVConfig`.
        head_plan: a strategy, a plan, or the path of a plan's JSON file.
        max_copies: most extra head copies a layer, for `fair_copying`; None: one less than devices.
        kv_cache_memory_bytes: of the KV pool over all devices; None: 1 GiB on CPU, and on GPUs
            what `gpu_memory_utilization` leaves beside the weights.

    Raises:
        ValueError: an option is out of its limits, or the checkpoint cannot be read.
    """
    kv_config = KVConfig(
        policy=kv_policy,
        budget=kv_budget,
        ratio=kv_ratio,
        window=kv_window,
        pool=kv_pool,
        kernel=kv_kernel,
        pool_first=kv_pool_first,
        floor=kv_floor,
        alpha=kv_alpha,
    )
    make_policy(kv_config)  # a wrong option shows before anything is loaded
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    checkpoint = open_checkpoint(model)
    config = checkpoint.config
    context = config.max_position_embeddings
    if max_model_len is not None and max_model_len > context:
        raise ValueError(f"max_model_len {max_model_len} is beyond the model's context {context}")
    plan = _make_plan(
        head_plan, config, checkpoint.name, kv_config, tensor_parallel_size, max_copies
    )
    if kv_cache_memory_bytes is None:
        kv_cache_memory_bytes = _kv_bytes(
            config, plan, jnp.dtype(dtype).itemsize, gpu_memory_utilization
        )
    engine_config = EngineConfig(
        tensor_parallel_size=tensor_parallel_size,
        max_model_len=max_model_len or context,
        max_num_seqs=max_num_seqs,
        page_size=page_size,
        kv_cache_bytes=kv_cache_memory_bytes,
        dtype=dtype,
        seed=seed,
    )
    return LLMEngine(checkpoint, plan, engine_config, kv_config, progress=progress)


def _make_plan(
    head_plan: str | Path | Plan,
    config: ModelConfig,
    name: str,
    kv_config: KVConfig,
    num_devices: int,
    max_copies: int | None,
) -> Plan:
    """The plan asked for, checked against the model and the number of devices."""
    if isinstance(head_plan, Plan):
        plan = head_plan
    elif head_plan in STRATEGIES:
        tokens = kv_config.kept_tokens(config.max_position_embeddings)
        profile = Profile.uniform(config.num_layers, config.num_kv_heads, tokens)
        plan = make_plan(profile, num_devices, str(head_plan), max_copies=max_copies)
    elif Path(head_plan).is_file():
        plan = Plan.from_json(Path(head_plan).read_text())
    else:
        raise ValueError(
            f"head_plan {str(head_plan)!r} is neither one of {', '.join(STRATEGIES)} nor a file"
        )
    has = (len(plan.layers), plan.n_heads, plan.n_devices)
    needs = (config.num_layers, config.num_kv_heads, num_devices)
    if has != needs:
        raise ValueError(
            f"the plan is for (layers, KV heads, devices) = {has}, but {name} on "
            f"tensor_parallel_size {num_devices} has {needs}: make a plan for these"
        )
    return plan


def _kv_bytes(config: ModelConfig, plan: Plan, itemsize: int, utilization: float) -> int:
    """Bytes for the pool over all devices: what is left of them, or a fixed size on CPU."""
    if not 0 < utilization <= 1:
        raise ValueError(f"gpu_memory_utilization must lie in (0, 1], got {utilization}")
    stats = jax.local_devices()[0].memory_stats()
    if not stats:
        return _CPU_KV_BYTES
    heads = plan.slots * plan.n_devices * config.num_layers
    per_head = (2 * config.group_size + 2) * config.head_dim * config.hidden_size
    mlp = 3 * config.num_layers * config.intermediate_size * config.hidden_size
    vocab = (2 - config.tie_word_embeddings) * config.vocab_size * config.hidden_size
    weights = itemsize * (heads * per_head + mlp + vocab)
    granted = int(stats["bytes_limit"] * utilization) * plan.n_devices
    if granted <= weights:
        raise ValueError(
            f"the weights need {weights / 2**30:.1f} GiB, gpu_memory_utilization {utilization} "
            f"grants {granted / 2**30:.1f} GiB over {plan.n_devices} device(s): raise it, or use "
            "more devices"
        )
    return granted - weights
