"""From options, as `LLM` and `serve` take them, to an engine."""

import logging
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp

from fairkv_jax.checkpoint import Checkpoint, open_checkpoint
from fairkv_jax.checkpoint.fetch import DEMO_MODEL
from fairkv_jax.checkpoint.needs import device_bytes
from fairkv_jax.compress import make_policy
from fairkv_jax.config import EngineConfig, KVConfig, ModelConfig
from fairkv_jax.engine.llm_engine import LLMEngine
from fairkv_jax.pallas.ragged_decode import AUTO, check_backend
from fairkv_jax.plan import (
    HARDWARE,
    STRATEGIES,
    CostModel,
    ModelShape,
    Plan,
    Profile,
    make_plan,
    shipped_profile,
)

logger = logging.getLogger(__name__)

DTYPES = ("auto", "float32", "bfloat16", "float16")
_CPU_KV_BYTES = 1 << 30
_PREFILL_BLOCKS = {"cpu": 128}
"""As short as the device can compute without loss; others wait for one at the least."""


def build_engine(
    model: str | Path = DEMO_MODEL,
    *,
    tensor_parallel_size: int = 1,
    max_model_len: int | None = None,
    max_num_seqs: int = 8,
    dtype: str = "auto",
    quantization: str | None = None,
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
    kv_head_budgets: str | Path | Profile | None = None,
    head_plan: str | Path | Plan = "fair_copying",
    max_extra_replicas: int | None = None,
    page_size: int = 16,
    kv_cache_memory_bytes: int | None = None,
    gpu_memory_utilization: float = 0.9,
    prefill_block: int | None = None,
    attention_backend: str = AUTO,
    progress: bool = True,
) -> LLMEngine:
    """Opens a checkpoint, plans its heads, loads it onto the devices.

    Args:
        model: a checkpoint's path, the name of one under `checkpoints/`, or OWNER/MODEL of the
            Hugging Face Hub, which is then fetched.
        max_model_len: most tokens of a request, prompt and output; None: the model's context.
        dtype: of weights and cache; "auto" is float32 on CPU and bfloat16 on GPUs.
        quantization: "int8": the weights' matrices in half of bfloat16's bytes; None: in dtype.
        kv_policy and the other kv_ options: see `KVConfig`.
        kv_head_budgets: for the policy `head_budgets`: a profile, or the path of its JSON file,
            whose tokens are the budgets.
        head_plan: a strategy, a plan, or the path of a plan's JSON file.
        max_extra_replicas: most extra replicas per layer, for `fair_copying`; None: limited by the
            slots only.
        kv_cache_memory_bytes: of the KV pool over all devices; None: 1 GiB on CPU, and on GPUs
            what `gpu_memory_utilization` leaves beside the weights.
        prefill_block: prompt tokens that pass a layer at a time; None: 128 on CPU, 1024 on GPUs.
        attention_backend: the implementation of decode attention; "auto" goes by the device.

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
        head_budgets=None if kv_head_budgets is None else _head_budgets(kv_head_budgets),
    )
    make_policy(kv_config)  # a wrong option shows before anything is loaded
    check_backend(attention_backend)
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    checkpoint = open_checkpoint(model)
    config = checkpoint.config
    _check_head_budgets(kv_config, config)
    context = config.max_position_embeddings
    engine_config = EngineConfig(
        tensor_parallel_size=tensor_parallel_size,
        max_model_len=context if max_model_len is None else max_model_len,
        max_num_seqs=max_num_seqs,
        page_size=page_size,
        kv_cache_bytes=_CPU_KV_BYTES if kv_cache_memory_bytes is None else kv_cache_memory_bytes,
        dtype=dtype,
        quantization=quantization,
        seed=seed,
        prefill_block=_PREFILL_BLOCKS.get(jax.default_backend(), 1024)
        if prefill_block is None
        else prefill_block,
        attention_backend=attention_backend,
    )
    if engine_config.max_model_len > context:
        raise ValueError(f"max_model_len {max_model_len} is beyond the model's context {context}")
    itemsize = jnp.dtype(dtype).itemsize
    shape = ModelShape.from_config(config)
    cost = CostModel.of(
        shape, tensor_parallel_size, _hardware(), batch=max_num_seqs, itemsize=itemsize
    )
    profile = _profile(checkpoint, shape, kv_config, engine_config.max_model_len)
    plan = _plan(
        head_plan, profile, checkpoint.name, cost, tensor_parallel_size, max_extra_replicas
    )
    if kv_cache_memory_bytes is None:
        weights = device_bytes(config, plan, itemsize, int8=quantization == "int8")
        prefill = _prefill_bytes(shape, kv_config, engine_config.max_model_len, itemsize)
        taken = plan.num_devices * (sum(weights.values()) + prefill)
        num_bytes = _kv_bytes(taken, plan.num_devices, gpu_memory_utilization)
        engine_config = replace(engine_config, kv_cache_bytes=num_bytes)
    return LLMEngine(checkpoint, plan, engine_config, kv_config, progress=progress)


def _head_budgets(source: str | Path | Profile) -> tuple[tuple[int, ...], ...]:
    """A profile's tokens, rounded, as budgets of its heads."""
    profile = source
    if not isinstance(profile, Profile):
        if not Path(profile).is_file():
            raise ValueError(f"kv_head_budgets {str(source)!r} is no file: give a profile's JSON")
        profile = Profile.from_json(Path(profile).read_text(encoding="utf-8"))
    return tuple(tuple(max(1, round(tokens)) for tokens in layer) for layer in profile.tokens)


def _check_head_budgets(kv_config: KVConfig, config: ModelConfig) -> None:
    table = kv_config.head_budgets
    needs = (config.num_layers, config.num_kv_heads)
    if table is not None and (len(table), len(table[0])) != needs:
        raise ValueError(
            f"kv_head_budgets is a table of {len(table)} x {len(table[0])}, but the model has "
            f"{needs[0]} layers x {needs[1]} KV heads"
        )


def _hardware() -> str:
    """The cost model's name for the devices that are here; an H100 where it has none."""
    kind = jax.devices()[0].device_kind.upper()
    return next((name for name in HARDWARE if name in kind), "H100")


def _profile(
    checkpoint: Checkpoint, shape: ModelShape, kv_config: KVConfig, context: int
) -> Profile:
    """What each head is expected to hold: as measured, scaled to the budget, or its budget."""
    measured = _measured_profile(checkpoint, shape, kv_config.policy)
    if measured is not None:
        kept = kv_config.kept_tokens(context)
        tokens = (measured.array * (kept / measured.array.mean())).tolist()
        return replace(measured, tokens=tokens, budget=kv_config.budget, spread=None, samples=None)
    budgets = kv_config.budgets(context, shape.num_layers, shape.num_kv_heads)
    return Profile(
        model=checkpoint.name,
        policy=kv_config.policy,
        budget=kv_config.budget,
        tokens=tuple(tuple(float(min(budget, context)) for budget in layer) for layer in budgets),
        source="budgets",
        shape=shape,
    )


def _measured_profile(checkpoint: Checkpoint, shape: ModelShape, policy: str) -> Profile | None:
    """The profile that lies beside the weights, else the shipped one; None: neither fits."""
    carried = checkpoint.profile
    if carried is not None:
        has = (carried.num_layers, carried.num_heads)
        if has != (shape.num_layers, shape.num_kv_heads):
            raise ValueError(
                f"the profile beside the weights of {checkpoint.name} is of {has[0]} layers x "
                f"{has[1]} KV heads, the model of {shape.num_layers} x {shape.num_kv_heads}: "
                "measure a new one, or remove it"
            )
        if carried.policy == policy:
            return carried
        logger.info("the profile beside the weights is of %s, not %s", carried.policy, policy)
    shipped = shipped_profile(checkpoint.name, policy)
    return shipped if shipped is not None and shipped.shape == shape else None


def _plan(
    head_plan: str | Path | Plan,
    profile: Profile,
    name: str,
    cost: CostModel,
    num_devices: int,
    max_extra_replicas: int | None,
) -> Plan:
    """The plan asked for, checked against the model and the number of devices."""
    if isinstance(head_plan, Plan):
        plan = head_plan
    elif head_plan in STRATEGIES:
        plan = make_plan(
            profile, num_devices, str(head_plan), max_extra_replicas=max_extra_replicas, cost=cost
        )
    elif isinstance(head_plan, str | Path) and Path(head_plan).is_file():
        plan = Plan.from_json(Path(head_plan).read_text())
    else:
        raise ValueError(
            f"head_plan {str(head_plan)!r} is neither one of {', '.join(STRATEGIES)} nor a file"
        )
    has = (len(plan.layers), plan.num_heads, plan.num_devices)
    needs = (profile.num_layers, profile.num_heads, num_devices)
    if has != needs:
        raise ValueError(
            f"the plan is for (layers, KV heads, devices) = {has}, but {name} on "
            f"tensor_parallel_size {num_devices} has {needs}: make a plan for these"
        )
    return plan


def _prefill_bytes(
    shape: ModelShape, kv_config: KVConfig, max_model_len: int, itemsize: int
) -> int:
    """What the longest prefill takes on a device beside the weights: the state between its units.

    One layer's keys and values twice, as packing reads them all, and the scores of its keys.
    """
    heads = (shape.num_layers, shape.num_kv_heads)
    kept = kv_config.most_kept_of_a_layer(max_model_len, *heads)
    prefix = 2 * shape.num_layers * kept * shape.head_dim * itemsize
    keys = 2 * 2 * shape.num_kv_heads * shape.head_dim * itemsize
    scores = 3 * 4 * shape.num_heads * kv_config.window
    return prefix + max_model_len * (shape.hidden_size * itemsize + keys + scores)


def _kv_bytes(taken_bytes: int, num_devices: int, utilization: float) -> int:
    """Bytes for the pool over all devices: what is left of them, or a fixed size on CPU.

    Raises:
        ValueError: nothing is left.
    """
    if not 0 < utilization <= 1:
        raise ValueError(f"gpu_memory_utilization must lie in (0, 1], got {utilization}")
    stats = jax.local_devices()[0].memory_stats()
    if not stats:
        return _CPU_KV_BYTES
    granted = int(stats["bytes_limit"] * utilization) * num_devices
    if granted <= taken_bytes:
        raise ValueError(
            f"weights and prefill need {taken_bytes / 2**30:.1f} GiB, gpu_memory_utilization "
            f"{utilization} grants {granted / 2**30:.1f} GiB over {num_devices} device(s): "
            "raise it, lower max_model_len, or use more devices"
        )
    return granted - taken_bytes
