"""The planner's cost constants from measured shares of decode steps, where no hardware has them."""

from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.gpu_suite.inputs import Sizes
from benchmarks.gpu_suite.layers import Steps
from benchmarks.gpu_suite.programs import interleaved
from fairkv_jax.plan import Calibration, CostModel, ModelShape, Step, calibrate


def fitted(steps: Steps, sizes: Sizes, shape: ModelShape, batch: int) -> Calibration:
    """Fits the costs of a head slot and of a cached token at this batch, in CPU time.

    All heads and rows have equal lengths here, so that the fit knows nothing of the plans whose
    times it predicts: one slot and the most that any plan needs without copies plus one, each with
    few tokens and with many.
    """
    means = [mean for points_batch, mean in sizes.points if points_batch == batch]
    slots = 1, -(-shape.num_kv_heads // min(sizes.devices)) + 1
    tokens = min(means), 2 * max(means)
    lengths = {
        (count, row): np.full((shape.num_layers, batch, count), -(-row // count), np.int32)
        for count in slots
        for row in tokens
    }
    steps.prepare(lengths.values(), [])
    calls = {key: steps.attention(each) for key, each in lengths.items()}
    times = interleaved(calls, sizes.repeats)
    measured = [
        Step(shape.num_layers * count, float(lengths[count, row].sum()), times[count, row].cpu)
        for count, row in lengths
    ]
    itemsize = np.dtype(sizes.dtype).itemsize
    cost = CostModel.of(shape, min(sizes.devices), "CPU", batch=batch, itemsize=itemsize)
    return calibrate(measured, replace(cost, hardware=""))


def record(found: Calibration) -> dict[str, Any]:
    """The fitted constants as a record of the results."""
    return {
        "fitted": "costs of attention",
        "batch": found.cost.batch,
        "slot_us": 1e6 * found.cost.a_seconds,
        "token_ns": 1e9 * found.cost.b_seconds_per_token,
        "constant_ms": 1e3 * found.cost.rest_seconds,
        "fit_error": found.relative_error,
    }
