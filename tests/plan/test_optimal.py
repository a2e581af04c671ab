"""The planner against exhaustive search, on instances small enough for it."""

import numpy as np
import pytest

from fairkv_jax.plan import CostModel, Plan, Profile, make_plan
from tests.plan.brute_force import best_equal, best_proportional, better_layer_exists


def _profile(weights: np.ndarray) -> Profile:
    return Profile("random", "ada_snapkv", 256, weights.tolist())


def _cost(a_in_tokens: float) -> CostModel:
    """A cost in which one slot weighs as much as `a_in_tokens` of the batch's tokens."""
    return CostModel(a_seconds=a_in_tokens * 4e-9, b_seconds_per_token=1e-9, batch=4)


def _weights(seed: int, layers: int, heads: int) -> np.ndarray:
    return np.random.default_rng(seed).gamma(1.5, size=(layers, heads)) * 100 + 5


def _slots_and_peak(plan: Plan, weights: np.ndarray) -> tuple[int, float]:
    return plan.slots, np.einsum("lk,lkp->lp", weights, plan.shares()).max(1).sum()


@pytest.mark.parametrize("a_in_tokens", [0.0, 40.0, 400.0])
@pytest.mark.parametrize(("heads", "devices", "copies"), [(7, 4, 3), (6, 4, 2), (7, 3, 3)])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_nothing_beats_equal_splits(seed, heads, devices, copies, a_in_tokens):
    weights, cost = _weights(seed, 1, heads), _cost(a_in_tokens)
    plan = make_plan(_profile(weights), devices, max_extra_replicas=copies, cost=cost)
    for slots in range(-(-heads // devices), heads + 1):
        left = plan.step_seconds - slots * cost.a_seconds
        target = left / cost.b_seconds_per_token / cost.batch * (1 - 1e-5)
        assert not better_layer_exists(weights[0], devices, slots, copies, target)


@pytest.mark.parametrize("a_in_tokens", [0.0, 60.0])
@pytest.mark.parametrize(
    ("row_split", "oracle"), [("equal", best_equal), ("proportional", best_proportional)]
)
@pytest.mark.parametrize(("heads", "devices", "copies"), [(4, 2, 1), (4, 3, 1), (3, 3, 2)])
@pytest.mark.parametrize("seed", range(2))
def test_layers_share_the_best_slots(seed, heads, devices, copies, row_split, oracle, a_in_tokens):
    weights, cost = _weights(seed, 2, heads), _cost(a_in_tokens)
    plan = make_plan(
        _profile(weights), devices, row_split=row_split, max_extra_replicas=copies, cost=cost
    )
    best = min(
        len(weights) * slots * cost.a_seconds
        + cost.batch
        * cost.b_seconds_per_token
        * sum(oracle(layer, devices, slots, copies) for layer in weights)
        for slots in range(-(-heads // devices), heads + 1)
    )
    assert plan.step_seconds == pytest.approx(best, rel=1e-5)
    slots, peak = _slots_and_peak(plan, weights)
    assert plan.step_seconds == pytest.approx(
        len(weights) * slots * cost.a_seconds + cost.batch * peak * cost.b_seconds_per_token
    )
    assert plan.lower_bound_seconds <= best * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_best_effort_is_optimal_without_copies(seed):
    weights = _weights(seed, 1, 5)
    plan = make_plan(_profile(weights), 3, "best_effort", cost=_cost(0.0))
    best = best_equal(weights[0], 3, 5, 0)
    assert plan.step_seconds == pytest.approx(best * 4e-9, rel=1e-6)
    assert plan.num_extra_replicas == 0
