"""What every plan keeps, whatever the profile."""

import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairkv_jax.plan import SHAPES, STRATEGIES, CostModel, ModelShape, Plan, Profile, make_plan

ALL = [(strategy, "equal") for strategy in STRATEGIES] + [("fair_copying", "proportional")]


@st.composite
def profiles(draw, least_heads: int = 1, most_heads: int = 6):
    """Profiles of distinct weights, from a drawn seed: even, or with a few very heavy heads."""
    shape = draw(st.integers(1, 3)), draw(st.integers(least_heads, most_heads))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    spread = draw(st.sampled_from([0.1, 0.7, 2.0]))
    tokens = np.exp(rng.normal(size=shape) * spread) * 100
    return Profile("drawn", "ada_snapkv", 100, tokens.tolist())


costs = st.sampled_from([0.0, 30.0, 1000.0]).map(
    lambda tokens: CostModel(a_seconds=tokens * 8e-9, b_seconds_per_token=1e-9, batch=8)
)


def _attention_seconds(plan: Plan, profile: Profile) -> float:
    """The step time from the plan's layers alone, by the formula."""
    slots = max(
        sum(copy.device == device for copy in layer)
        for layer in plan.layers
        for device in range(plan.num_devices)
    )
    seconds = 0.0
    for tokens, layer in zip(profile.tokens, plan.layers, strict=True):
        held = [0.0] * plan.num_devices
        for copy in layer:
            held[copy.device] += copy.share * tokens[copy.head]
        seconds += slots * plan.cost.a_seconds
        seconds += plan.cost.batch * max(held) * plan.cost.b_seconds_per_token
    return seconds


@settings(max_examples=30)
@given(profile=profiles(), devices=st.sampled_from([1, 2, 3, 4, 8]), cost=costs)
def test_no_strategy_is_slower_than_a_simpler_one(profile, devices, cost):
    plans = [
        make_plan(profile, devices, name, row_split=split, cost=cost, effort=0)
        for name, split in ALL
    ]
    static, best_effort, equal, proportional = (plan.step_seconds for plan in plans)
    assert best_effort <= static * (1 + 1e-9)
    assert equal <= best_effort * (1 + 1e-9)
    assert proportional <= best_effort * (1 + 1e-9)
    for plan in plans:
        assert plan.step_seconds == pytest.approx(_attention_seconds(plan, profile))
        assert plan.lower_bound_seconds <= plan.step_seconds
        assert 0 < plan.utilization <= 1 + 1e-9


@settings(max_examples=25)
@given(
    profile=profiles(),
    devices=st.sampled_from([2, 3, 4]),
    cost=costs,
    row_split=st.sampled_from(["equal", "proportional"]),
)
def test_limits_hold_and_more_replicas_never_cost(profile, devices, cost, row_split):
    before = np.inf
    for copies in (0, 1, 2, 3, None):
        plan = make_plan(
            profile, devices, row_split=row_split, max_extra_replicas=copies, cost=cost, effort=0
        )
        if copies is not None:
            assert all(len(layer) - plan.num_heads <= copies for layer in plan.layers)
        assert np.allclose(plan.shares().sum(2), 1)
        assert plan.step_seconds <= before * (1 + 1e-9)
        before = plan.step_seconds
        slots = -(-plan.num_heads // devices)
        tight = make_plan(
            profile,
            devices,
            row_split=row_split,
            max_extra_replicas=copies,
            max_slots=slots,
            cost=cost,
            effort=0,
        )
        assert tight.slots == slots
        assert tight.step_seconds >= plan.step_seconds * (1 - 1e-9)


def test_more_replicas_never_cost_with_the_exact_solver():
    tokens = np.random.default_rng(4).gamma(1.5, size=(2, 7)) * 100
    profile = Profile("random", "ada_snapkv", 150, tokens.tolist())
    seconds = [
        make_plan(profile, 3, max_extra_replicas=copies).step_seconds
        for copies in (0, 1, 2, 4, None)
    ]
    assert seconds == sorted(seconds, reverse=True)


@settings(max_examples=25)
@given(
    profile=profiles(least_heads=2),
    devices=st.sampled_from([2, 3, 4]),
    cost=costs,
    row_split=st.sampled_from(["equal", "proportional"]),
    seed=st.integers(0, 1000),
)
def test_permuting_heads_permutes_the_plan(profile, devices, cost, row_split, seed):
    order = np.random.default_rng(seed).permutation(profile.num_heads)
    permuted = Profile("drawn", "ada_snapkv", 100, profile.array[:, order].tolist())
    options = {"row_split": row_split, "cost": cost, "effort": 0}
    first = make_plan(profile, devices, **options)
    second = make_plan(permuted, devices, **options)
    assert np.allclose(first.shares()[:, order], second.shares(), atol=1e-6)


@settings(max_examples=20)
@given(profile=profiles(most_heads=9), devices=st.sampled_from([2, 3, 4, 8]))
def test_free_shares_fill_every_device_where_weights_are_free(profile, devices):
    cost = CostModel(a_seconds=0.0, b_seconds_per_token=1e-9, batch=16)
    # McNaughton's rule needs at most one split per device but the last.
    plan = make_plan(
        profile,
        devices,
        row_split="proportional",
        max_extra_replicas=devices - 1,
        cost=cost,
        effort=0,
    )
    assert plan.utilization >= 0.99
    assert all(len(layer) - plan.num_heads <= devices - 1 for layer in plan.layers)


def test_a_device_full_of_light_heads_takes_one_more():
    """Where slots are free, the search goes on although the last slots have gained nothing."""
    tokens = (1351.63, 1265.04, 606.68, 142.04, 38.55, 35.97, 34.34, 5.75, 2.31)
    cost = CostModel(a_seconds=0.0, b_seconds_per_token=1e-9, batch=16)
    plan = make_plan(
        Profile("", "ada_snapkv", 100, (tokens,)),
        4,
        row_split="proportional",
        max_extra_replicas=3,
        cost=cost,
        effort=0,
    )
    assert plan.utilization >= 0.999


def test_free_shares_fill_eight_devices_with_eight_heads():
    tokens = np.random.default_rng(0).gamma(1.0, size=(10, 8)) * 100 + 1
    profile = Profile("random", "ada_snapkv", 100, tokens.tolist())
    cost = CostModel(a_seconds=0.0, b_seconds_per_token=1e-9, batch=16)
    plan = make_plan(profile, 8, row_split="proportional", cost=cost, effort=0)
    assert plan.utilization >= 0.9999


@pytest.mark.parametrize(("strategy", "row_split"), ALL)
@pytest.mark.parametrize("devices", [1, 2, 3, 4, 8])
def test_three_heads_on_any_number_of_devices(strategy, row_split, devices):
    tokens = np.random.default_rng(1).gamma(2.0, size=(4, 3)) * 100
    profile = Profile("smollm2-135m", "ada_snapkv", 200, tokens.tolist())
    plan = make_plan(profile, devices, strategy, row_split=row_split)
    slots = plan.head_of_slot()
    assert slots.shape == (4, devices, plan.slots)
    assert slots.dtype == np.int32
    for layer in slots:
        assert set(layer[layer >= 0]) == {0, 1, 2}
    if strategy == "static":
        blocks = np.array_split(np.arange(3), devices)
        for device, heads in enumerate(blocks):
            filled = slots[:, device][slots[:, device] >= 0]
            assert filled.tolist() == heads.tolist() * 4


@pytest.mark.parametrize("row_split", ["equal", "proportional"])
def test_only_the_slots_limit_replicas_by_default(row_split):
    """Half of the heads keep 8,192 tokens and half 384, as DuoAttention's heads do.

    A second slot per device has room for one replica more than `devices - 1`, and using it saves
    several percent of the attention time.
    """
    tokens = np.full(32 * 8, 384.0)
    tokens[np.random.default_rng(0).permutation(32 * 8)[:128]] = 8192
    rows = tuple(map(tuple, tokens.reshape(32, 8).tolist()))
    profile = Profile("half", "head_budgets", None, rows)
    cost = CostModel.of(SHAPES["llama-3.1-8b"], 8, "H100", batch=64)
    static = make_plan(profile, 8, "static", cost=cost)
    unlimited = make_plan(profile, 8, row_split=row_split, cost=cost)
    limited = make_plan(profile, 8, row_split=row_split, max_extra_replicas=7, cost=cost)
    assert unlimited.step_seconds < limited.step_seconds * 0.96
    assert static.step_seconds / unlimited.step_seconds > 1.6
    assert unlimited.slots == limited.slots
    assert unlimited.one_more_replica_gain == 0
    assert max(len(layer) for layer in unlimited.layers) == unlimited.slots * 8


@pytest.mark.parametrize("heads", [8, 64])
def test_many_heads_are_planned_in_seconds(heads):
    """80 layers on 8 devices take about 3 s; the limit leaves room for a busy machine."""
    tokens = np.where(np.random.default_rng(0).random((80, heads)) < 0.5, 8192.0, 384.0)
    tokens *= np.random.default_rng(1).lognormal(0, 0.05, tokens.shape)
    shape = ModelShape(80, 8192, 64, heads, 128, 28672, 128256)
    profile = Profile("m", "head_budgets", None, tuple(map(tuple, tokens.tolist())), shape=shape)
    start = time.process_time()
    plan = make_plan(profile, 8, cost=CostModel.of(shape, 8, batch=64))
    assert time.process_time() - start < 20
    assert plan.gap < 0.05


def test_memory_is_balanced_over_layers():
    """Two devices, one heavy head in each layer: the heavy device must alternate."""
    profile = Profile("two", "ada_snapkv", 20, ((30.0, 10.0),) * 10)
    plan = make_plan(profile, 2, "best_effort")
    assert plan.fullest_tokens == pytest.approx(200)
    assert make_plan(profile, 2, "static").fullest_tokens == pytest.approx(300)


def test_one_more_replica_gains_what_it_then_gives():
    profile = Profile("heavy", "ada_snapkv", 50, ((90.0, 10.0),) * 2)
    cost = CostModel(a_seconds=0.0, b_seconds_per_token=1e-9, batch=16)
    assert make_plan(profile, 3, "best_effort", cost=cost).one_more_replica_gain == 0
    plans = [make_plan(profile, 3, max_extra_replicas=copies, cost=cost) for copies in range(3)]
    assert [plan.step_seconds / (16 * 2e-9) for plan in plans] == pytest.approx([90, 45, 40])
    assert plans[0].one_more_replica_gain == pytest.approx(90 / 45 - 1)
    assert plans[1].one_more_replica_gain == pytest.approx(45 / 40 - 1)


def test_the_same_input_gives_the_same_bytes_and_no_jax():
    program = (
        "import sys, numpy as np\n"
        "from fairkv_jax.plan import Profile, make_plan\n"
        "tokens = np.random.default_rng(0).gamma(2, size=(3, 4)) * 100\n"
        "profile = Profile('m', 'p', 1, tokens.tolist())\n"
        "assert 'jax' not in sys.modules\n"
        "print(make_plan(profile, 3, row_split=sys.argv[1]).to_json())\n"
    )
    for row_split in ("equal", "proportional"):
        command = [sys.executable, "-c", program, row_split]
        texts = {subprocess.run(command, capture_output=True, check=True).stdout for _ in range(2)}
        assert len(texts) == 1
