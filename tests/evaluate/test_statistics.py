"""Intervals against SciPy and published values."""

import numpy as np
import pytest
from scipy.stats import binomtest, ttest_1samp

from fairkv_jax.evaluate.statistics import paired_difference, student, wilson


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (3, 10), (10, 10), (57, 80)])
def test_wilson_is_scipys(hits: int, n: int):
    got = wilson([1.0] * hits + [0.0] * (n - hits))
    want = binomtest(hits, n).proportion_ci(0.95, method="wilson")
    assert (got.low, got.high) == pytest.approx((want.low, want.high), abs=1e-12)
    assert (got.mean, got.n) == (hits / n, n)


def test_pairs_are_those_of_agresti_and_min():
    """b = 12 losses and c = 4 gains of 50 pairs: Wald's with 0.5 added to every cell."""
    scores = [0.0] * 12 + [1.0] * 4 + [1.0] * 34
    baseline = [1.0] * 12 + [0.0] * 4 + [1.0] * 34
    got = paired_difference(scores, baseline)
    b, c, n = 12.5, 4.5, 52
    half = 1.959964 * np.sqrt(b + c - (b - c) ** 2 / n) / n
    assert got.mean == pytest.approx(-8 / 50)
    assert (got.low, got.high) == pytest.approx((-8 / n - half, -8 / n + half), abs=1e-6)


def test_pairs_that_all_agree_leave_doubt():
    got = paired_difference([1.0] * 10, [1.0] * 10)
    assert got.mean == 0
    assert got.low == -got.high < -0.1


def test_student_is_scipys():
    values = [0.3, 0.9, 0.4, 1.3]
    got, want = student(values), ttest_1samp(values, 0).confidence_interval(0.95)
    assert (got.low, got.high) == pytest.approx((want.low, want.high))
    assert student([1.0]).high == np.inf
