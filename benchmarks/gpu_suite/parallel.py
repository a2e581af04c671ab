"""Tensor parallelism emulated on one GPU: each device's share of a decode step, one after another.

A share is the engine's own attention layer (norm, projections, append and attend, output
projection) on that device's slots, with its rows' lengths as the engine's router deals them. A
layer lasts as long as its slowest share, which is the one with the most tokens, because all
devices compute the same number of slots: walking the layers with each one's fullest device gives
`sum over layers of the slowest share`. MLPs and logits are split evenly and timed once. The
all-reduces are left out, and estimated apart.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_suite.bandwidth import seconds_of
from benchmarks.gpu_suite.inputs import Sizes, ragged_cache
from fairkv_jax.pallas.ragged_decode import AUTO, Device, append_and_decode
from fairkv_jax.plan import HARDWARE, SHAPES, CostModel, ModelShape, Plan, Profile, make_plan, route
from fairkv_jax.profile import synthetic_profile

STRATEGIES = ("static", "best_effort", "fair_copying")
IMBALANCE = 0.6
LINK_BYTES_PER_SECOND = 450e9
"""NVLink of an H100 or H200, one direction: for the estimate of the all-reduces."""
ALL_REDUCE_LATENCY = 10e-6
DTYPE = "bfloat16"


def measure(sizes: Sizes, device: Device) -> list[dict[str, Any]]:
    """One record a (model, devices, strategy, equal batch or equal memory)."""
    records = []
    hardware = next((name for name in HARDWARE if name in device.kind.upper()), "H100")
    for model in sizes.models:
        shape = SHAPES[model]
        if sizes.emulated_layers is not None:
            shape = replace(shape, num_layers=sizes.emulated_layers)
        profile = synthetic_profile(shape, sizes.mean_tokens, model=model, imbalance=IMBALANCE)
        for num_devices in sizes.devices:
            compared = _compare(sizes, device, hardware, shape, profile, num_devices)
            records += [{"model": model, "devices": num_devices} | record for record in compared]
    return records


def _compare(
    sizes: Sizes,
    device: Device,
    hardware: str,
    shape: ModelShape,
    profile: Profile,
    num_devices: int,
) -> list[dict[str, Any]]:
    """The strategies at one batch, then each at the batch that fits where static's fits."""
    batch, records = sizes.emulated_batch, []
    cost = CostModel.of(shape, num_devices, hardware, batch=batch)
    memory = make_plan(profile, num_devices, "static", cost=cost).device_bytes
    for strategy in STRATEGIES:
        plan = make_plan(profile, num_devices, strategy, cost=cost)
        weights = cost.rest_bytes + plan.n_layers * plan.slots * cost.head_bytes
        row = plan.fullest_tokens * cost.token_bytes
        fitting = max(1, int((memory - weights) / row))
        for equal, rows in (("batch", batch), ("memory", fitting)):
            record = _time(sizes, device, shape, profile, plan, rows)
            at_rows = replace(cost, batch=rows)
            predicted = _predicted(plan, profile, at_rows)
            records.append({"equal": equal, "strategy": strategy, "batch": rows} | record)
            records[-1]["predicted_tokens_per_second"] = rows / predicted
    for record in records:
        base = next(
            r for r in records if r["strategy"] == "static" and r["equal"] == record["equal"]
        )
        for key in ("tokens_per_second", "predicted_tokens_per_second"):
            record[f"{key}_over_static"] = record[key] / base[key]
    return records


def _predicted(plan: Plan, profile: Profile, cost: CostModel) -> float:
    """Seconds of a step as the planner's cost model has it, at the batch of `cost`."""
    load = np.einsum("lk,lkp->lp", profile.array, plan.shares()).max(1).sum()
    attention = plan.n_layers * plan.slots * cost.a_seconds
    return attention + cost.batch * load * cost.b_seconds_per_token + cost.rest_seconds


def _time(
    sizes: Sizes, device: Device, shape: ModelShape, profile: Profile, plan: Plan, batch: int
) -> dict[str, Any]:
    owned = owned_lengths(profile, plan, batch)
    fullest = owned.sum((1, 3)).argmax(1)
    layers = np.arange(len(owned))
    attention = _attention_seconds(sizes, device, shape, owned[layers, :, fullest])
    rest = _rest_seconds(sizes, shape, plan.n_devices, batch)
    ring = 2 * (plan.n_devices - 1) / plan.n_devices
    one = ALL_REDUCE_LATENCY + ring * batch * shape.hidden_size * 2 / LINK_BYTES_PER_SECOND
    reduces = 2 * shape.num_layers * one
    return {
        "slots": plan.slots,
        "copies": plan.n_copies,
        "attention_ms": 1e3 * attention,
        "rest_ms": 1e3 * rest,
        "all_reduce_estimate_ms": 1e3 * reduces,
        "tokens_per_second": batch / (attention + rest),
        "tokens_per_second_with_all_reduce": batch / (attention + rest + reduces),
    }


def owned_lengths(profile: Profile, plan: Plan, batch: int) -> np.ndarray:
    """[L, B, P, C] tokens that each slot owns of each row, dealt by the engine's router."""
    rng = np.random.default_rng(7)
    copies, slot_heads = plan.copies(), plan.slot_heads()
    load = np.zeros((plan.n_layers, plan.n_devices))
    owned = np.zeros((plan.n_layers, batch, *slot_heads.shape[1:]), np.int32)
    layer, device, slot = np.nonzero(slot_heads >= 0)
    head = slot_heads[layer, device, slot]
    for row in range(batch):
        lengths = profile.array * rng.lognormal(0, 0.1, profile.array.shape)
        lengths = np.maximum(1, lengths.round()).astype(np.int32)
        owner = route(copies, lengths, load)
        np.add.at(load, (np.arange(plan.n_layers)[:, None], owner), lengths)
        mine = owner[layer, head] == device
        owned[layer, row, device, slot] = np.where(mine, lengths[layer, head], 0)
    return owned


def _attention_seconds(
    sizes: Sizes, device: Device, shape: ModelShape, lengths: np.ndarray
) -> float:
    """Of walking all layers with these lengths [L, B, C]."""
    layers, batch, slots = lengths.shape
    group, width, hidden = shape.num_heads // shape.num_kv_heads, shape.head_dim, shape.hidden_size
    k_pages, v_pages, table = ragged_cache(5, lengths, width, DTYPE, room=1)
    qkv = _weights(1, (layers, slots * (group + 2) * width, hidden))
    out = _weights(2, (layers, slots * group * width, hidden))

    def step(x: Any, pool: Any, qkv: Any, out: Any, table: Any, lengths: Any) -> Any:
        def layer(carry: Any, inputs: Any) -> tuple[Any, None]:
            x, pool = carry
            qkv, out, table, lengths = inputs
            heads = (_normed(x) @ qkv.T).reshape(batch, slots, group + 2, width)
            q, k, v = heads[:, :, :group], heads[:, :, group], heads[:, :, group + 1]
            o, pool = append_and_decode(q, k, v, pool, table, lengths, backend=AUTO, device=device)
            x = x + o.astype(x.dtype).reshape(batch, -1) @ out
            return (x, pool), None

        return jax.lax.scan(layer, (x, pool), (qkv, out, table, lengths))[0]

    walk = jax.jit(step, donate_argnums=1)
    x = jnp.ones((batch, hidden), DTYPE)
    pool = [(k_pages, v_pages)]

    def again() -> Any:
        # The pool is donated, as in the engine: the next call takes what this one gives back.
        y, pool[0] = walk(x, pool[0], qkv, out, table, jnp.asarray(lengths))
        return y

    return seconds_of(again, (), sizes.repeats)


def _rest_seconds(sizes: Sizes, shape: ModelShape, num_devices: int, batch: int) -> float:
    """Of one device's part of all MLPs and of the logits."""
    part, hidden = -(-shape.intermediate_size // num_devices), shape.hidden_size
    gate, up, down = (_weights(seed, (shape.num_layers, part, hidden)) for seed in (3, 4, 5))
    unembed = _weights(6, (-(-shape.vocab_size // num_devices), hidden))

    def step(x: Any, gate: Any, up: Any, down: Any, unembed: Any) -> Any:
        def layer(x: Any, weights: Any) -> tuple[Any, None]:
            gate, up, down = weights
            h = _normed(x)
            return x + (jax.nn.silu(h @ gate.T) * (h @ up.T)) @ down, None

        x, _ = jax.lax.scan(layer, x, (gate, up, down))
        return _normed(x) @ unembed.T

    x = jnp.ones((batch, hidden), DTYPE)
    return seconds_of(jax.jit(step), (x, gate, up, down, unembed), sizes.repeats)


def _normed(x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-5)).astype(x.dtype)


def _weights(seed: int, shape: tuple[int, ...]) -> jax.Array:
    draw = jax.jit(lambda key: jax.random.normal(key, shape, DTYPE) * 0.02)
    return draw(jax.random.key(seed)).astype(DTYPE)
