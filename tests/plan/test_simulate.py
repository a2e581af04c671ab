"""Whole rows from shares, and requests replayed through a plan."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairkv_jax.plan import (
    CostModel,
    Profile,
    Workload,
    make_plan,
    row_counts,
    simulate,
    simulate_document,
)

COST = CostModel(a_seconds=0.0, b_seconds_per_token=1e-9, batch=16)


@given(
    weights=st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(any),
    batch=st.integers(1, 64),
)
def test_row_counts_are_within_one_of_their_due(weights, batch):
    shares = np.array(weights) / sum(weights)
    counts = row_counts(shares, batch)
    assert counts.sum() == batch
    assert (np.abs(counts - shares * batch) < 1).all()
    assert (counts[shares == 0] == 0).all()


def test_row_counts_go_to_the_largest_remainders():
    assert row_counts(np.array([0.5, 0.3, 0.2]), 8).tolist() == [4, 2, 2]
    assert row_counts(np.full(3, 1 / 3), 16).tolist() == [6, 5, 5]
    with pytest.raises(ValueError, match="must sum to 1"):
        row_counts(np.array([0.5, 0.4]), 8)


def _samples(prompts: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    heads = rng.gamma(4, size=(10, 3)) * 50
    return heads * rng.gamma(20, 1 / 20, size=(prompts, 10, 3))


def test_steps_follow_arrivals_ends_and_growth():
    profile = Profile.uniform(1, 2, 10)
    plan = make_plan(profile, 2, "static", cost=COST)
    workload = Workload(
        lengths=np.array([[[10.0, 10.0]], [[10.0, 30.0]], [[5.0, 5.0]]]),
        arrivals=np.array([0, 0, 7]),
        new_tokens=np.array([2, 1, 1]),
    )
    trace = simulate(plan, workload, batch=1)
    # Request 0 takes two steps, 1 waits for its row, then nothing runs until 2 comes.
    assert trace.seconds == pytest.approx(np.array([11, 12, 31, 6]) * 1e-9)
    assert trace.utilization == pytest.approx([1, 1, 21 / 31, 1])
    assert trace.rows.tolist() == [1, 1, 1, 1]
    both = simulate(plan, workload, batch=2)
    assert both.rows.tolist() == [2, 1, 1]
    assert both.seconds[0] == pytest.approx(42e-9)
    assert both.fullest_over_mean[0] == pytest.approx(42 / 32)


def test_routing_by_load_beats_rows_by_number():
    samples = _samples(32)
    profile = Profile.from_samples(samples[:16], model="m", policy="p", budget=200)
    workload = Workload.drawn(samples[16:], 80, rate=1.0, new_tokens=40)
    plan = make_plan(profile, 2, cost=COST)
    assert plan.num_extra_replicas
    routed, fixed = (simulate(plan, workload, 16, routed=routed) for routed in (True, False))
    static = simulate(make_plan(profile, 2, "static", cost=COST), workload, 16)
    assert routed.mean_utilization > fixed.mean_utilization > static.mean_utilization
    assert routed.utilization[routed.rows == 16].mean() >= 0.97
    assert routed.mean_token_balance == pytest.approx(routed.mean_utilization)


def test_bad_workloads_are_refused():
    lengths, ones = np.ones((2, 1, 2)), np.ones(2, int)
    with pytest.raises(ValueError, match="arrivals and new_tokens must have the shape"):
        Workload(lengths, np.ones(3, int), ones)
    with pytest.raises(ValueError, match="must be in ascending order"):
        Workload(lengths, np.array([1, 0]), ones)
    with pytest.raises(ValueError, match="requests, layers, heads"):
        Workload(np.ones((2, 2)), ones, ones)
    plan = make_plan(Profile.uniform(2, 2, 4), 2)
    with pytest.raises(ValueError, match="but the plan has"):
        simulate(plan, Workload(lengths, ones, ones), 2)


def test_rows_of_one_document_wait_for_the_device_where_it_lies():
    """Two heads on two devices, and a third one on both: worked out by hand."""
    profile = Profile("m", "p", None, ((40.0, 40.0, 60.0),))
    plan = make_plan(profile, 2, "fair_copying", cost=COST)
    assert plan.replicas()[0].sum(-1).tolist() == [1, 1, 2]
    lengths = profile.array.astype(int)
    pinned = simulate_document(plan, lengths, 4, 0, copies=False)
    assert pinned.seconds == pytest.approx(4 * 100e-9)
    assert (pinned.utilization, pinned.copied) == (pytest.approx(280 / 400), 0)
    copied = simulate_document(plan, lengths, 4, 0)
    assert copied.seconds == pytest.approx(280e-9)
    assert (copied.utilization, copied.copied) == (pytest.approx(1), pytest.approx(60 / 140))
    with pytest.raises(ValueError, match="layers and heads"):
        simulate_document(plan, lengths[:, :2], 4, 0)
