"""Tensor parallelism emulated on one GPU: each device's share of a decode step, one after another.

A share is the engine's own attention layer (norm, projections, append and attend, output
projection) on that device's slots, with its rows' lengths as the engine's router deals them. A
layer lasts as long as its slowest share, which is the one with the most tokens, because all
devices compute the same number of slots: walking the layers with each one's fullest device gives
`sum over layers of the slowest share`. MLPs and logits are split evenly and timed once. The
all-reduces are left out, and estimated apart.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from jax.stages import Lowered

from benchmarks.gpu_suite.inputs import Sizes
from benchmarks.gpu_suite.layers import (
    attention_seconds,
    lower_attention,
    lower_rest,
    rest_seconds,
    rest_weights,
)
from benchmarks.gpu_suite.programs import compile_all, said
from fairkv_jax.pallas.ragged_decode import Device
from fairkv_jax.plan import HARDWARE, SHAPES, CostModel, ModelShape, Plan, Profile, make_plan, route
from fairkv_jax.profile import synthetic_profile

STRATEGIES = ("static", "best_effort", "fair_copying")
IMBALANCE = 0.6
LINK_BYTES_PER_SECOND = 450e9
"""NVLink of an H100 or H200, one direction: for the estimate of the all-reduces."""
ALL_REDUCE_LATENCY = 10e-6


def measure(sizes: Sizes, device: Device) -> Iterator[dict[str, Any]]:
    """One record a (model, devices, equal batch or equal memory, strategy)."""
    hardware = next((name for name in HARDWARE if name in device.kind.upper()), "H100")
    for model in sizes.models:
        shape = SHAPES[model]
        if sizes.emulated_layers is not None:
            shape = replace(shape, num_layers=sizes.emulated_layers)
        profile = synthetic_profile(shape, sizes.mean_tokens, model=model, imbalance=IMBALANCE)
        for num_devices in sizes.devices:
            about = {"model": model, "devices": num_devices}
            try:
                cost = CostModel.of(shape, num_devices, hardware, batch=sizes.emulated_batch)
                for record in _compare(sizes, device, shape, profile, num_devices, cost):
                    yield about | record
            except Exception as error:  # the other models are worth measuring
                yield about | {"failed": said(error)}


def _compare(
    sizes: Sizes,
    device: Device,
    shape: ModelShape,
    profile: Profile,
    num_devices: int,
    cost: CostModel,
) -> Iterator[dict[str, Any]]:
    """The strategies at one batch, then each at the batch that fits where static's fits."""
    plans = {name: make_plan(profile, num_devices, name, cost=cost) for name in STRATEGIES}
    memory = plans["static"].device_bytes
    runs = [("batch", name, sizes.emulated_batch) for name in STRATEGIES]
    runs += [("memory", name, _fitting(plans[name], cost, memory)) for name in STRATEGIES]
    lengths = {
        (name, rows): fullest_lengths(profile, plans[name], rows)
        for name, rows in {run[1:]: None for run in runs}
    }
    programs: dict[Any, Callable[[], Lowered]] = {
        key: partial(lower_attention, shape, device, each) for key, each in lengths.items()
    }
    programs |= {rows: partial(lower_rest, shape, num_devices, rows) for _, _, rows in runs}
    compiled = compile_all(programs)
    weights = rest_weights(shape, num_devices)
    rest: dict[int, float] = {
        rows: rest_seconds(_running(compiled[rows]), weights, rows, sizes.repeats)
        for rows in sorted({run[2] for run in runs})
    }
    del weights
    attention: dict[Any, float] = {}
    static: dict[str, dict[str, Any]] = {}
    for equal, name, rows in runs:
        key = name, rows
        if key not in attention:
            program = _running(compiled[key])
            attention[key] = attention_seconds(program, shape, lengths[key], sizes.repeats)
        predicted = _predicted(plans[name], profile, replace(cost, batch=rows))
        record = _record(shape, plans[name], rows, attention[key], rest[rows])
        record |= {"predicted_tokens_per_second": rows / predicted}
        base = static.setdefault(equal, record)  # static comes first
        for figure in ("tokens_per_second", "predicted_tokens_per_second"):
            record[f"{figure}_over_static"] = record[figure] / base[figure]
        yield {"equal": equal, "strategy": name} | record


def _running(program: Any) -> Any:
    if isinstance(program, Exception):
        raise program
    return program


def _fitting(plan: Plan, cost: CostModel, memory: float) -> int:
    """Rows whose KV fits beside the plan's weights."""
    weights = cost.rest_bytes + plan.num_layers * plan.slots * cost.head_bytes
    return max(1, int((memory - weights) / (plan.fullest_tokens * cost.token_bytes)))


def _record(
    shape: ModelShape, plan: Plan, batch: int, attention: float, rest: float
) -> dict[str, Any]:
    ring = 2 * (plan.num_devices - 1) / plan.num_devices
    one = ALL_REDUCE_LATENCY + ring * batch * shape.hidden_size * 2 / LINK_BYTES_PER_SECOND
    reduces = 2 * shape.num_layers * one
    return {
        "batch": batch,
        "slots": plan.slots,
        "copies": plan.num_extra_replicas,
        "attention_ms": 1e3 * attention,
        "rest_ms": 1e3 * rest,
        "all_reduce_estimate_ms": 1e3 * reduces,
        "tokens_per_second": batch / (attention + rest),
        "tokens_per_second_with_all_reduce": batch / (attention + rest + reduces),
    }


def _predicted(plan: Plan, profile: Profile, cost: CostModel) -> float:
    """Seconds of a step as the planner's cost model has it, at the batch of `cost`."""
    load = np.einsum("lk,lkp->lp", profile.array, plan.shares()).max(1).sum()
    attention = plan.num_layers * plan.slots * cost.a_seconds
    return attention + cost.batch * load * cost.b_seconds_per_token + cost.rest_seconds


def fullest_lengths(profile: Profile, plan: Plan, batch: int) -> np.ndarray:
    """[L, B, C] of the device that has the most tokens in a layer."""
    owned = owned_lengths(profile, plan, batch)
    return owned[np.arange(len(owned)), :, owned.sum((1, 3)).argmax(1)]


def owned_lengths(profile: Profile, plan: Plan, batch: int) -> np.ndarray:
    """[L, B, P, C] tokens that each slot owns of each row, dealt by the engine's router."""
    rng = np.random.default_rng(7)
    copies, head_of_slot = plan.replicas(), plan.head_of_slot()
    load = np.zeros((plan.num_layers, plan.num_devices))
    owned = np.zeros((plan.num_layers, batch, *head_of_slot.shape[1:]), np.int32)
    layer, device, slot = np.nonzero(head_of_slot >= 0)
    head = head_of_slot[layer, device, slot]
    for row in range(batch):
        lengths = profile.array * rng.lognormal(0, 0.1, profile.array.shape)
        lengths = np.maximum(1, lengths.round()).astype(np.int32)
        owner = route(copies, lengths, load)
        np.add.at(load, (np.arange(plan.num_layers)[:, None], owner), lengths)
        mine = owner[layer, head] == device
        owned[layer, row, device, slot] = np.where(mine, lengths[layer, head], 0)
    return owned
