"""Tensor parallelism emulated on one device: each device's share of a decode step, one by one.

A share is the engine's own attention layer (norm, projections, append and attend, output
projection) on that device's slots, with its rows' lengths as the engine's router deals them. A
layer lasts as long as its slowest share, which is the one with the most tokens, because all
devices compute the same number of slots: walking the layers with each one's fullest device gives
`sum over layers of the slowest share`. MLPs and logits are split evenly and timed once. The
all-reduces are left out; on a GPU they are estimated apart.

The rows are the prompts of a published head profile where there is one, and the plans are made of
the same prompts. The strategies are timed in turn.
"""

from collections.abc import Collection, Iterator
from dataclasses import replace
from math import inf
from typing import Any

import jax
import numpy as np

from benchmarks.balance.compare import candidates, choose
from benchmarks.gpu_suite import calibration
from benchmarks.gpu_suite.head_lengths import HeadLengths, head_lengths
from benchmarks.gpu_suite.inputs import Sizes
from benchmarks.gpu_suite.layers import Steps
from benchmarks.gpu_suite.programs import QUEUED, Seconds, interleaved, said, timed
from fairkv_jax.pallas.ragged_decode import Device
from fairkv_jax.plan import HARDWARE, Calibration, CostModel, ModelShape, Plan, route

STRATEGIES = ("static", "best_effort", "fair_copying")
LINK_BYTES_PER_SECOND = 450e9
"""NVLink of an H100 or H200, one direction: for the estimate of the all-reduces."""
ALL_REDUCE_LATENCY = 10e-6
WORKSPACE = 0.05
"""Memory that programs need beside their arguments, as a fraction of these."""

Record = dict[str, Any]
Run = tuple[str, int]
"""A strategy and a batch."""


def measure(sizes: Sizes, device: Device) -> Iterator[Record]:
    """One record a (devices, batch and tokens, profile, equal batch or equal memory, strategy)."""
    found = list(head_lengths(sizes))
    searched: dict[Any, dict[str, list[Plan]]] = {}
    emulation: Emulation | None = None
    for num_devices in sizes.devices:
        for batch, mean_tokens in sizes.points:
            for heads in found:
                about = {"model": heads.model, "profile": heads.profile, "devices": num_devices}
                about["mean_tokens"] = mean_tokens
                try:
                    if emulation is None or emulation.model != heads.model:
                        emulation = None  # frees its arrays before others are made
                        emulation = Emulation(sizes, device, heads.model)
                    search = num_devices, heads.model, heads.profile
                    if search not in searched:
                        searched[search] = candidates(heads.at(mean_tokens), num_devices)
                    cost, fit = emulation.cost(num_devices, batch)
                    yield from [{"model": heads.model} | calibration.record(fit)] if fit else []
                    for record in emulation.compare(heads, searched[search], mean_tokens, cost):
                        yield about | record
                except Exception as error:  # the other comparisons are worth measuring
                    yield about | {"batch": batch, "failed": said(error)}
                    emulation = None  # the call that failed may have taken its arrays


class Emulation:
    """Comparisons of strategies on one model."""

    def __init__(self, sizes: Sizes, device: Device, model: str) -> None:
        self.model, self._sizes = model, sizes
        self._shape: ModelShape = sizes.shapes[model]
        self._steps = Steps(self._shape, device, sizes.dtype, sizes.least_pages)
        self._hardware = next((name for name in HARDWARE if name in device.kind.upper()), "H100")
        self._fits: dict[int, Calibration] = {}
        self._rests: dict[tuple[int, int], float] = {}

    def cost(self, num_devices: int, batch: int) -> tuple[CostModel, Calibration | None]:
        """The planner's costs: the hardware's on a GPU, on a CPU those that are measured here.

        The second is the fit of those costs if it is new.
        """
        sizes, steps = self._sizes, self._steps
        if not sizes.on_cpu:
            return CostModel.of(self._shape, num_devices, self._hardware, batch=batch), None
        new = None
        if batch not in self._fits:
            new = self._fits[batch] = calibration.fitted(steps, sizes, self._shape, batch)
        fit = self._fits[batch].cost
        rest = num_devices, batch
        if rest not in self._rests:
            steps.prepare([], [rest])
            self._rests[rest] = interleaved({"": steps.rest(*rest)}, sizes.repeats)[""].cpu
        return replace(fit, rest_seconds=fit.rest_seconds + self._rests[rest]), new

    def compare(
        self, heads: HeadLengths, found: dict[str, list[Plan]], mean_tokens: int, cost: CostModel
    ) -> Iterator[Record]:
        """The strategies at the batch of `cost`, and then at the batch that fits as `static`'s."""
        profile = heads.at(mean_tokens)
        at_batch = {
            name.replace(" ", "_"): plan for name, plan in choose(found, profile, cost).items()
        }
        compared = {"batch": at_batch}
        if self._sizes.equal_memory:
            memory = at_batch["static"].device_bytes * (1 + 1e-9)  # its own batch must fit
            plans = choose(found, profile, cost, memory)
            compared["memory"] = {name.replace(" ", "_"): plan for name, plan in plans.items()}
        owned = {
            (name, plan.cost.batch): owned_lengths(heads.rows(plan.cost.batch, mean_tokens), plan)
            for plans in compared.values()
            for name, plan in plans.items()
        }
        missing = self._missing_bytes(owned.values())
        if missing:
            yield {"batch": cost.batch, "skipped": f"{missing / 1e9:.1f} GB of memory are missing"}
            return
        shares = self._times(owned, compared["batch"]["static"].num_devices)
        for equal, plans in compared.items():
            base: Record = {}
            for name, plan in plans.items():
                run = name, plan.cost.batch
                record = self._record(plan, owned[run], *shares[run])
                base = base or record  # static comes first
                record |= _ratios(record, base)
                yield {"equal": equal, "strategy": name} | record

    def _clock(self, seconds: Seconds) -> float:
        """The time that is compared: CPU time on a CPU, where other programs run too."""
        return seconds.cpu if self._sizes.on_cpu else seconds.wall

    def _times(
        self, owned: dict[Run, np.ndarray], num_devices: int
    ) -> dict[Run, tuple[Seconds, Seconds, float]]:
        """Attention of the fullest devices, the rest, and the mean over devices of attention."""
        steps, sizes = self._steps, self._sizes
        peaks = {run: fullest_lengths(each) for run, each in owned.items()}
        first = {run: _first_equal(peaks, run) for run in peaks}
        batches = sorted({batch for _, batch in owned})
        steps.prepare(peaks.values(), [(num_devices, batch) for batch in batches])
        calls: dict[Any, Any] = {run: steps.attention(peaks[run]) for run in first.values()}
        calls |= {batch: steps.rest(num_devices, batch) for batch in batches}
        times = interleaved(calls, sizes.repeats)
        found = {}
        for run in first.values():
            shares = (steps.attention(owned[run][:, :, each]) for each in range(num_devices))
            queued = 1 if sizes.on_cpu else QUEUED
            found[run] = float(np.mean([self._clock(timed(call, queued)) for call in shares]))
        return {run: (times[first[run]], times[run[1]], found[first[run]]) for run in owned}

    def _missing_bytes(self, owned: Collection[np.ndarray]) -> float:
        """Bytes of memory that a comparison needs beyond what the device has."""
        limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", inf)
        num_devices = next(iter(owned)).shape[2]
        needed = self._steps.num_bytes(map(fullest_lengths, owned), num_devices)
        return max(0.0, (1 + WORKSPACE) * needed - limit)

    def _record(
        self, plan: Plan, owned: np.ndarray, attention: Seconds, rest: Seconds, mean: float
    ) -> Record:
        batch, used, spent = plan.cost.batch, self._clock(attention), self._clock(rest)
        load = owned.sum((1, 3))
        slot_seconds = plan.num_layers * plan.slots * plan.cost.a_seconds
        dealt = slot_seconds + load.max(1).sum() * plan.cost.b_seconds_per_token
        predicted = plan.step_seconds + plan.rest_seconds
        record: Record = {
            "batch": batch,
            "slots": plan.slots,
            "copies": plan.num_extra_replicas,
            "kv_share": (plan.step_seconds - slot_seconds) / predicted,
            "utilization_of_tokens": float(load.mean(1).sum() / load.max(1).sum()),
            "utilization_of_time": mean / used,
            "attention_ms": 1e3 * used,
            "rest_ms": 1e3 * spent,
            "tokens_per_second": batch / (used + spent),
            "predicted_tokens_per_second": batch / predicted,
            "predicted_tokens_per_second_as_dealt": batch / float(dealt + plan.rest_seconds),
        }
        if self._sizes.on_cpu:
            record["wall_tokens_per_second"] = batch / (attention.wall + rest.wall)
            return record
        ring = 2 * (plan.num_devices - 1) / plan.num_devices
        moved = ring * batch * self._shape.hidden_size * 2 / LINK_BYTES_PER_SECOND
        reduces = 2 * self._shape.num_layers * (ALL_REDUCE_LATENCY + moved)
        record["all_reduce_estimate_ms"] = 1e3 * reduces
        record["tokens_per_second_with_all_reduce"] = batch / (used + spent + reduces)
        return record


def _ratios(record: Record, base: Record) -> Record:
    """A record's speeds over those of `static`, and the measured ratio over the predicted one."""
    figures = [name for name in record if "tokens_per_second" in name]
    ratios = {f"{name}_over_static": record[name] / base[name] for name in figures}
    predicted = ratios["predicted_tokens_per_second_over_static"]
    return ratios | {"measured_over_predicted": ratios["tokens_per_second_over_static"] / predicted}


def _first_equal(lengths: dict[Run, np.ndarray], run: Run) -> Run:
    """The first run with the same lengths: strategies may choose the same plan."""
    return next(other for other in lengths if np.array_equal(lengths[other], lengths[run]))


def fullest_lengths(owned: np.ndarray) -> np.ndarray:
    """[L, B, C] of the device that has the most tokens in a layer, of `owned` [L, B, P, C]."""
    return owned[np.arange(len(owned)), :, owned.sum((1, 3)).argmax(1)]


def owned_lengths(rows: np.ndarray, plan: Plan) -> np.ndarray:
    """[L, B, P, C] tokens that each slot owns of each row, dealt by the engine's router.

    Args:
        rows: [B, L, K] tokens of every row and head.
    """
    copies, head_of_slot = plan.replicas(), plan.head_of_slot()
    load = np.zeros((plan.num_layers, plan.num_devices))
    owned = np.zeros((plan.num_layers, len(rows), *head_of_slot.shape[1:]), np.int32)
    layer, device, slot = np.nonzero(head_of_slot >= 0)
    head = head_of_slot[layer, device, slot]
    for row, lengths in enumerate(rows):
        owner = route(copies, lengths, load)
        np.add.at(load, (np.arange(plan.num_layers)[:, None], owner), lengths)
        mine = owner[layer, head] == device
        owned[layer, row, device, slot] = np.where(mine, lengths[layer, head], 0)
    return owned
