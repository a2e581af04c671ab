"""Chooses the head plan of an engine: which devices hold which KV heads.

profile beside the weights, shipped profile, or budgets ──► expected load ──► plan
"""

import logging
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp

from fairkv_jax.checkpoint import Checkpoint
from fairkv_jax.compress.budgets import budgets_per_head, num_kept_tokens
from fairkv_jax.config import BuildOptions, EngineConfig, KVConfig
from fairkv_jax.pallas.ragged_decode import is_kind
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


def choose_plan(
    checkpoint: Checkpoint,
    build_options: BuildOptions,
    engine_config: EngineConfig,
    kv_config: KVConfig,
) -> Plan:
    """Makes or reads the plan, and checks it against the model and the number of devices.

    Raises:
        ValueError: `head_plan` is neither a strategy nor a plan for this model and these devices.
    """
    shape = ModelShape.from_config(checkpoint.config)
    profile = _profile(checkpoint, shape, kv_config, engine_config.max_model_len)
    num_devices = engine_config.tensor_parallel_size
    source = build_options.head_plan
    if isinstance(source, Plan):
        plan = source
    elif source in STRATEGIES:
        cost = CostModel.of(
            shape,
            num_devices,
            _hardware(),
            batch=engine_config.max_num_seqs,
            itemsize=jnp.dtype(engine_config.dtype).itemsize,
            kv_cache_dtype=engine_config.kv_cache_dtype,
        )
        plan = make_plan(
            profile,
            num_devices,
            str(source),
            max_extra_replicas=build_options.max_extra_replicas,
            cost=cost,
        )
    elif isinstance(source, str | Path) and Path(source).is_file():
        plan = Plan.from_json(Path(source).read_text())
    else:
        raise ValueError(
            f"head_plan {str(source)!r} is neither one of {', '.join(STRATEGIES)} nor a file"
        )
    has = (len(plan.layers), plan.num_heads, plan.num_devices)
    needs = (profile.num_layers, profile.num_heads, num_devices)
    if has != needs:
        raise ValueError(
            f"the plan is for (layers, KV heads, devices) = {has}, but {checkpoint.name} on "
            f"tensor_parallel_size {num_devices} has {needs}: make a plan for these"
        )
    return plan


def _hardware() -> str:
    """Returns the cost model's name for the devices; an H100 if it does not know them."""
    kind = jax.devices()[0].device_kind.upper()
    return next((name for name in HARDWARE if is_kind(name, kind)), "H100")


def _profile(
    checkpoint: Checkpoint, shape: ModelShape, kv_config: KVConfig, context: int
) -> Profile:
    """Returns the tokens that each head is expected to hold.

    They are the budgets, where those say how much each head keeps, or if nothing was measured;
    otherwise a measured profile scaled to the budget.
    """
    measured = _measured_profile(checkpoint, shape, kv_config.policy)
    is_known = kv_config.has_budget_per_head or not kv_config.is_plain
    if measured is not None and not is_known:
        kept = num_kept_tokens(kv_config, context)
        tokens = (measured.array * (kept / measured.array.mean())).tolist()
        return replace(measured, tokens=tokens, budget=kv_config.budget, spread=None, samples=None)
    budgets = budgets_per_head(kv_config, context, shape.num_layers, shape.num_kv_heads)
    return Profile(
        model=checkpoint.name,
        policy=kv_config.policy,
        budget=kv_config.budget,
        tokens=tuple(tuple(float(min(budget, context)) for budget in layer) for layer in budgets),
        source="budgets",
        shape=shape,
    )


def _measured_profile(checkpoint: Checkpoint, shape: ModelShape, policy: str) -> Profile | None:
    """Returns the profile stored with the weights, else the shipped one if it fits, else None."""
    carried = checkpoint.profile
    if carried is not None:
        has = (carried.num_layers, carried.num_heads)
        if has != (shape.num_layers, shape.num_kv_heads):
            raise ValueError(
                f"the profile beside the weights of {checkpoint.name} has {has[0]} layers x "
                f"{has[1]} KV heads, but the model has {shape.num_layers} x "
                f"{shape.num_kv_heads}: measure a new one, or remove it"
            )
        if carried.policy == policy:
            return carried
        logger.info(
            "the profile beside the weights was measured with the policy %s, not %s",
            carried.policy,
            policy,
        )
    shipped = shipped_profile(checkpoint.name, policy)
    return shipped if shipped is not None and shipped.shape == shape else None
