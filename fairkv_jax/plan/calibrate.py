"""Fits the cost model to decode steps that were measured."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import nnls

from fairkv_jax.plan.cost import CostModel


@dataclass(frozen=True)
class Step:
    """One measured decode step, or the median of several alike."""

    slots: int
    """Head slots that each device computes: L * C."""
    peak_tokens: float
    """Cached tokens of all rows on the fullest device of each layer, added over layers."""
    seconds: float


@dataclass(frozen=True)
class Calibration:
    """A fitted cost model and how well it explains the steps."""

    cost: CostModel
    relative_error: float
    """Root mean square of (predicted - measured) / measured."""


def calibrate(steps: Sequence[Step], cost: CostModel) -> Calibration:
    """Fits seconds = rest + a * slots + b * tokens, all at least 0, by least relative squares.

    `cost` gives what timing does not tell (bytes, batch). To tell a, b and the rest apart the
    steps must differ in both slots and tokens.

    Raises:
        ValueError: there are too few or too similar steps, or tokens do not show in the time.
    """
    rows = np.array([[1.0, step.slots, step.peak_tokens] for step in steps]).reshape(-1, 3)
    seconds = np.array([step.seconds for step in steps])
    if len(rows) < 3 or not np.isfinite(rows).all() or not (seconds > 0).all():
        raise ValueError(
            f"calibration needs at least 3 steps of positive, finite time, got {len(rows)} steps"
        )
    scale = rows.max(0)
    if not (scale > 0).all() or np.linalg.matrix_rank(rows / scale, tol=1e-6) < 3:
        raise ValueError(
            "the measured steps cannot tell weights, tokens and the rest apart: "
            "measure at least two numbers of slots, and two of tokens"
        )
    scaled, _ = nnls(rows / scale / seconds[:, None], np.ones(len(rows)))
    rest, a, b = (float(value) for value in scaled / scale)
    if b == 0:
        raise ValueError(
            "the measured steps take no longer with more cached tokens: measure longer caches"
        )
    error = rows @ np.array([rest, a, b]) / seconds - 1
    fitted = replace(cost, a_seconds=a, b_seconds_per_token=b, rest_seconds=rest)
    return Calibration(fitted, float(np.sqrt(np.mean(error**2))))
