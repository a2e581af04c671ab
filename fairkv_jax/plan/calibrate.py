"""Fits the cost model to measured decode steps."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fairkv_jax.plan.cost import CostModel


@dataclass(frozen=True)
class Step:
    """One measured decode step, or the median of several equal ones."""

    slots: int
    """Head slots that each device computes: L * C."""
    peak_tokens: float
    """Cached tokens of all rows on the fullest device of each layer, summed over layers."""
    seconds: float


@dataclass(frozen=True)
class Calibration:
    """A fitted cost model and its error on the measured steps."""

    cost: CostModel
    relative_error: float
    """Root mean square of (predicted - measured) / measured."""


def calibrate(steps: Sequence[Step], cost: CostModel) -> Calibration:
    """Fits seconds = rest + a * slots + b * tokens by non-negative relative least squares.

    `cost` supplies the fields that times do not determine, such as bytes and batch. The steps must
    differ in both slots and tokens; otherwise a, b and rest cannot be determined.

    >>> from fairkv_jax.plan import CostModel, Step, calibrate
    >>> steps = [Step(64, 1e4, 278e-6), Step(64, 1e5, 728e-6), Step(128, 1e4, 406e-6)]
    >>> fitted = calibrate(steps, CostModel.tokens_only(batch=8))  # a Calibration
    >>> f"{fitted.cost.a_seconds * 1e6:.1f} us, {fitted.cost.b_seconds_per_token * 1e9:.1f} ns"
    '2.0 us, 5.0 ns'

    Raises:
        ValueError: there are too few steps, they are too similar, or their times do not depend on
            the tokens.
    """
    rows = np.array([[1.0, step.slots, step.peak_tokens] for step in steps]).reshape(-1, 3)
    seconds = np.array([step.seconds for step in steps])
    if len(rows) < 3 or not np.isfinite(rows).all() or not (seconds > 0).all():
        raise ValueError(
            "calibration needs at least 3 steps with positive, finite figures, got "
            f"{len(rows)} steps: measure more"
        )
    scale = rows.max(0)
    if not (scale > 0).all() or np.linalg.matrix_rank(rows / scale, tol=1e-6) < 3:
        raise ValueError(
            "the measured steps do not determine the costs of weights, tokens and the rest: "
            "measure at least two different numbers of slots and two of tokens"
        )
    from scipy.optimize import nnls  # importing it takes long, and only this needs it

    scaled, _ = nnls(rows / scale / seconds[:, None], np.ones(len(rows)))
    rest, a, b = (float(value) for value in scaled / scale)
    if b == 0:
        raise ValueError(
            "the measured times do not increase with the cached tokens: measure longer caches"
        )
    error = rows @ np.array([rest, a, b]) / seconds - 1
    fitted = replace(cost, a_seconds=a, b_seconds_per_token=b, rest_seconds=rest)
    return Calibration(fitted, float(np.sqrt(np.mean(error**2))))
