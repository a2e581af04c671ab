"""Compares the strategies at equal batch, at equal memory, and on prompts that no plan has seen."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from benchmarks.balance.published import Published, PublishedProfile
from fairkv_jax.plan import HARDWARE, CostModel, Plan, Profile, Workload, make_plan, simulate
from fairkv_jax.plan.cost import Objective

COMPARED = {
    "static": ("static", "equal"),
    "best effort": ("best_effort", "equal"),
    "fair copying": ("fair_copying", "proportional"),
}
BATCHES = (16, 32, 64, 128, 256)
KEPT = (1024, 2048, 4096, 8192, 16384)
MEMORY_FOR_USE = 0.9
"""Fraction of a device's memory for weights and KV cache."""
HELD_OUT_BATCH, HELD_OUT_KEPT = 64, 2048
PLANNED, REPLAYED = slice(0, None, 2), slice(1, None, 2)
"""Every second prompt makes the plan, the others are replayed."""
ENOUGH = 1 + 1e-4
"""More slots are not tried if the fullest devices hold at most this much more than the mean."""


@dataclass(frozen=True)
class Figures:
    """A plan's figures; ratios are relative to `static`, and above 1 is faster."""

    utilization: float
    """Busy time divided by elapsed time in attention, slot weights included."""
    token_utilization: float
    """The same if weights cost nothing, in the layers that the profile covers."""
    attention_ratio: float
    """Speed of attention per row."""
    step_ratio: float
    """Tokens/s, with the time of all weights."""
    extra_replicas: int
    slots: int
    device_bytes: float
    """Weights and cache of the fullest device."""

    @classmethod
    def of(cls, plan: Plan, static: Plan, profile: Profile, covered: int) -> "Figures":
        """Takes the figures of a plan whose first `covered` layers are those of the profile."""
        loads = plan.loads(profile.array)[:covered]
        per_row = plan.step_seconds / plan.cost.batch
        return cls(
            utilization=round(plan.utilization, 4),
            token_utilization=round(float(loads.mean(1).sum() / loads.max(1).sum()), 4),
            attention_ratio=round(static.step_seconds / static.cost.batch / per_row, 4),
            step_ratio=round(plan.tokens_per_second / static.tokens_per_second, 4),
            extra_replicas=plan.num_extra_replicas,
            slots=plan.slots,
            device_bytes=round(plan.device_bytes, -7),
        )


def candidates(profile: Profile, devices: int) -> dict[str, list[Plan]]:
    """Returns, for every strategy, the plan with the most even tokens for each number of slots.

    The time of a step depends on a plan by its slots and by the tokens of its fullest devices
    alone, so one of these is the best one at any cost, and at any scale of the profile.
    """
    only_tokens = CostModel.tokens_only(batch=1)
    found: dict[str, list[Plan]] = {}
    for name, (kind, split) in COMPARED.items():
        plans: list[Plan] = []
        least = -(-profile.num_heads // devices)
        for slots in range(least, profile.num_heads + 1):
            plan = make_plan(
                profile,
                devices,
                kind,
                row_split=split,
                max_slots=slots,
                cost=only_tokens,
                effort=0,
            )
            plans.append(plan)
            even = plan.step_seconds <= ENOUGH * plan.utilization * plan.step_seconds
            if kind == "static" or even or plan.slots < slots:
                break
        found[name] = plans
    return found


def choose(
    found: dict[str, list[Plan]], profile: Profile, cost: CostModel, memory: float | None = None
) -> dict[str, Plan]:
    """Returns every strategy's fastest plan among the candidates, with its figures.

    A strategy may fall back on a plan without copies, or on `static`. With `memory`, the bytes of
    a device, every plan has the batch that fits.

    Raises:
        ValueError: not one row fits.
    """
    name = "latency" if memory is None else "throughput"
    objective = Objective(cost, profile.num_layers, name, memory)
    chosen: dict[str, Plan] = {}
    for strategy, plans in found.items():
        fitting = [plan for plan in (_at(each, profile, objective) for each in plans) if plan]
        fitting += chosen.values()
        if not fitting:
            raise ValueError(f"{profile.model} does not fit into {memory:.3g} bytes per device")
        chosen[strategy] = max(fitting, key=lambda plan: plan.tokens_per_second)
    return chosen


def _at(plan: Plan, profile: Profile, objective: Objective) -> Plan | None:
    """Returns the same assignment with its figures for another cost; None if no row fits."""
    loads = plan.loads(profile.array)
    peak, fullest = float(loads.max(1).sum()), float(loads.sum(0).max())
    batch = objective.batch(plan.slots, fullest)
    if not batch:
        return None
    cost = objective.at(batch)
    seconds = objective.attention_seconds(plan.slots, peak, batch)
    replicas = plan.num_layers * plan.num_heads + plan.num_extra_replicas
    busy = replicas * cost.a_seconds + loads.sum() * batch * cost.b_seconds_per_token
    return replace(
        plan,
        cost=cost,
        utilization=float(busy / plan.num_devices / seconds),
        step_seconds=seconds,
        lower_bound_seconds=seconds,
        fullest_tokens=fullest,
    )


def compare(published: Published, devices: int, hardware: str) -> dict[str, Any]:
    """Returns the record of one profile on one number of devices, as balance.json holds it.

    `equal_batch` has, for every strategy, tables of figures [batch][kept]. `held_out` is None where
    all prompts get the same budgets.
    """
    found = _candidates_at(published, devices)
    covered = published.model.budget_layers
    num_prompts = len(published.lengths(HELD_OUT_KEPT))
    tables: dict[str, list[list[Figures]]] = {name: [] for name in COMPARED}
    for batch in BATCHES:
        cost = published.model.cost(devices, hardware, batch)
        for rows in tables.values():
            rows.append([])
        for kept in KEPT:
            profile = published.at(kept)
            plans = choose(found[kept], profile, cost)
            for name, plan in plans.items():
                tables[name][-1].append(Figures.of(plan, plans["static"], profile, covered))
    return {
        "model": published.model.name,
        "scorer": published.scorer,
        "devices": devices,
        "equal_batch": {name: _columns(rows) for name, rows in tables.items()},
        "equal_memory": list(_equal_memory(published, found, devices, hardware)),
        "held_out": held_out(published, devices, hardware) if num_prompts > 1 else None,
    }


def _candidates_at(published: Published, devices: int) -> dict[int, dict[str, list[Plan]]]:
    """Returns the candidates for every number of kept tokens."""
    if published.scales:
        return dict.fromkeys(KEPT, candidates(published.at(KEPT[0]), devices))
    return {kept: candidates(published.at(kept), devices) for kept in KEPT}


def _columns(rows: list[list[Figures]]) -> dict[str, list[list[float]]]:
    """Turns a table of figures into a record of tables."""
    return {
        name: [[getattr(cell, name) for cell in row] for row in rows]
        for name in Figures.__dataclass_fields__
    }


def _equal_memory(
    published: Published,
    found: dict[int, dict[str, list[Plan]]],
    devices: int,
    hardware: str,
) -> Iterator[dict[str, Any]]:
    """Yields the figures at the batch that fits into the memory, a record per kept tokens.

    Nothing is yielded if the weights alone are too large.
    """
    memory = HARDWARE[hardware].memory_bytes * MEMORY_FOR_USE
    covered = published.model.budget_layers
    cost = published.model.cost(devices, hardware, BATCHES[-1])
    for kept in KEPT:
        profile = published.at(kept)
        try:
            plans = choose(found[kept], profile, cost, memory)
        except ValueError:
            return
        yield {
            "kept": kept,
            "strategies": {
                name: {"batch": plan.cost.batch}
                | asdict(Figures.of(plan, plans["static"], profile, covered))
                for name, plan in plans.items()
            },
        }


def held_out(published: Published, devices: int, hardware: str) -> dict[str, Any]:
    """Plans from half of the prompts and replays requests drawn from the other half.

    `routed`: the replica is chosen by the lengths of each request, as in the engine; `fixed`: by
    the number of its row. Ratios are relative to `static`. Only steps with a full batch count.
    """
    batch, kept = HELD_OUT_BATCH, HELD_OUT_KEPT
    cost = published.model.cost(devices, hardware, batch)
    planned = published.at(kept, PLANNED)
    plans = choose(candidates(planned, devices), planned, cost)
    workload = Workload.drawn(
        published.lengths(kept, REPLAYED), 4 * batch, rate=float(batch), new_tokens=64
    )
    found: dict[str, Any] = {}
    static = 0.0
    for name, plan in plans.items():
        for routed in (True, False) if plan.num_extra_replicas else (True,):
            trace = simulate(plan, workload, batch, routed=routed)
            full = trace.rows == batch
            seconds = trace.seconds[full]
            mean = float(seconds.mean())
            static = static or mean
            found[name if routed else f"{name}, fixed"] = {
                "utilization": round(
                    float(np.average(trace.utilization[full], weights=seconds)), 4
                ),
                "attention_ratio": round(static / mean, 4),
                "step_ratio": round((static + cost.rest_seconds) / (mean + cost.rest_seconds), 4),
            }
    return {"batch": batch, "kept": kept, "strategies": found}


def mean_kept(published: PublishedProfile) -> list[list[int]]:
    """Returns the mean over the prompts of the tokens that every head kept, [L][K]."""
    return np.rint(published.kept.mean(0)).astype(int).tolist()
