"""Confidence intervals of scores and of paired differences."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from scipy.stats import norm, t

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % confidence interval."""

    mean: float
    low: float
    high: float
    n: int
    """Independent documents."""


def wilson(scores: Sequence[float]) -> Estimate:
    """Returns the mean of scores in [0, 1] with its Wilson interval.

    Wilson (1927). Fractional scores count as that many successes; their variance is at most that of
    successes and failures, so that the interval is then wider than it need be.
    """
    n, mean, z = len(scores), float(np.mean(scores)), _z()
    centre = (mean + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * sqrt(mean * (1 - mean) / n + z**2 / (4 * n**2))
    return Estimate(mean, max(0.0, centre - half), min(1.0, centre + half), n)


def paired_difference(scores: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """Returns the mean of scores in [0, 1] less that of a baseline on the same documents.

    The interval is that of Agresti and Min (Statistics in Medicine, 2005): Wald's, after half a
    pair has been added to each of the four outcomes, so that it is not empty where all pairs agree.
    Fractional differences count as that part of a pair.
    """
    differences = np.subtract(scores, baseline)
    n, z = len(differences), _z()
    gains, losses = differences.clip(0).sum(), -differences.clip(None, 0).sum()
    centre = (gains - losses) / (n + 2)
    variance = (gains + losses + 1 - (gains - losses) ** 2 / (n + 2)) / (n + 2) ** 2
    half = z * sqrt(variance)
    mean = float(differences.mean())
    return Estimate(mean, max(-1.0, float(centre - half)), min(1.0, float(centre + half)), n)


def student(values: Sequence[float]) -> Estimate:
    """Returns the mean of real values with Student's interval; that of one value is unbounded."""
    n, mean = len(values), float(np.mean(values))
    if n == 1:
        return Estimate(mean, -np.inf, np.inf, n)
    half = float(t.ppf((1 + CONFIDENCE) / 2, n - 1) * np.std(values, ddof=1) / sqrt(n))
    return Estimate(mean, mean - half, mean + half, n)


def _z() -> float:
    return float(norm.ppf((1 + CONFIDENCE) / 2))
