"""Impossible limits say which limit it is, and the nearest that can be met."""

import re

import numpy as np
import pytest

from fairkv_jax.plan import SHAPES, CostModel, Profile, make_plan

TOKENS = np.random.default_rng(2).gamma(2.0, size=(30, 3)) * 100
PROFILE = Profile("smollm2-135m", "ada_snapkv", 200, TOKENS.tolist())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "best"}, "strategy must be one of static, best_effort, fair_copying"),
        ({"row_split": "fair"}, "row_split must be one of equal, proportional"),
        ({"max_extra_replicas": -1}, "max_extra_replicas must be an integer of at least 0, got -1"),
        ({"max_extra_replicas": 1.5}, "max_extra_replicas must be an integer"),
        ({"max_slots": 1}, "max_slots 1 cannot hold 3 heads on 2 devices: raise it to at least 2"),
        ({"effort": True}, "effort must be an integer"),
        ({"objective": "speed"}, "objective must be one of latency, throughput"),
        ({"objective": "throughput"}, "needs device_bytes"),
        ({"device_bytes": -1.0}, "device_bytes must be positive"),
        ({"device_bytes": 1e3}, "device_bytes 1000 cannot be met by strategy 'fair_copying'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_plan(PROFILE, 2, **options)


@pytest.mark.parametrize("devices", [0, -1, 2.0, True])
def test_devices_must_be_a_positive_integer(devices):
    with pytest.raises(ValueError, match="num_devices must be an integer of at least 1"):
        make_plan(PROFILE, devices)


@pytest.mark.parametrize("strategy", ["static", "best_effort", "fair_copying"])
def test_the_nearest_memory_and_batch_named_can_be_met(strategy):
    cost = CostModel.of(SHAPES["smollm2-135m"], 2, batch=64)
    free = make_plan(PROFILE, 2, strategy, cost=cost)
    limit = free.device_bytes * 0.98
    with pytest.raises(ValueError, match="device_bytes") as raised:
        make_plan(PROFILE, 2, strategy, cost=cost, device_bytes=limit)
    text = str(raised.value)
    needed = re.search(r"needs ([\d.e+]+) bytes", text)
    batch = re.search(r"a batch of (\d+) fits", text)
    assert needed is not None
    assert batch is not None
    make_plan(PROFILE, 2, strategy, cost=cost, device_bytes=float(needed[1]) * (1 + 1e-5))
    smaller = CostModel.of(SHAPES["smollm2-135m"], 2, batch=int(batch[1]))
    fits = make_plan(PROFILE, 2, strategy, cost=smaller, device_bytes=limit)
    assert fits.device_bytes <= limit


def test_throughput_turns_balance_into_batch():
    cost = CostModel.of(SHAPES["smollm2-135m"], 2, batch=16)
    memory = {"objective": "throughput", "device_bytes": 3e8, "cost": cost}
    static, fair = (make_plan(PROFILE, 2, name, **memory) for name in ("static", "fair_copying"))
    assert fair.cost.batch > static.cost.batch
    assert fair.tokens_per_second > static.tokens_per_second
    for plan in (static, fair):
        assert plan.device_bytes <= 3e8
        row = plan.fullest_tokens * cost.token_bytes
        assert plan.device_bytes + row > 3e8
