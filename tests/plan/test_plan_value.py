"""The plan as a value and as a file."""

import json

import numpy as np
import pytest

from fairkv_jax.plan import CostModel, Plan, Profile, make_plan

PROFILE = Profile("m", "ada_snapkv", 100, np.random.default_rng(3).gamma(2, size=(3, 5)).tolist())


def _record() -> dict:
    return json.loads(make_plan(PROFILE, 2).to_json())


@pytest.mark.parametrize("row_split", ["equal", "proportional"])
def test_json_gives_the_plan_back(row_split):
    plan = make_plan(PROFILE, 3, row_split=row_split)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert hash(again) == hash(plan)
    assert again.to_json() == plan.to_json()


def test_the_file_has_the_agreed_fields():
    record = _record()
    assert {"strategy", "row_split", "num_devices", "utilization", "step_seconds"} <= set(record)
    assert {"rest_seconds", "lower_bound_seconds", "cost", "layers"} <= set(record)
    assert {"a_seconds", "b_seconds_per_token", "batch"} <= set(record["cost"])
    assert set(record["layers"][0][0]) == {"head", "device", "share"}


def test_the_old_key_of_the_replica_gain_is_read():
    record = _record()
    del record["one_more_replica_gain"]
    plan = Plan.from_json(json.dumps(record | {"one_more_copy_gain": 0.25}))
    assert plan.one_more_replica_gain == 0.25


def test_a_file_with_the_agreed_fields_alone_is_enough():
    record = _record()
    kept = (
        "strategy", "row_split", "num_devices", "utilization", "step_seconds", "rest_seconds",
        "lower_bound_seconds", "layers",
    )  # fmt: skip
    cost = {key: record["cost"][key] for key in ("a_seconds", "b_seconds_per_token", "batch")}
    plan = Plan.from_json(json.dumps({key: record[key] for key in kept} | {"cost": cost}))
    assert plan.num_heads == 5
    assert plan.layers == make_plan(PROFILE, 2).layers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": []}, "no layers"),
        ({"layers": [3]}, "layer 0 of the plan must be a list"),
        ({"layers": [[{"head": 0, "device": 0}]]}, "must have head, device and share"),
        ({"layers": [[{"head": 0, "device": 9, "share": 1.0}]]}, "to device 9"),
        ({"layers": [[{"head": 0, "device": 0, "share": 0.5}]]}, "must sum to 1, got 0.5"),
        ({"layers": [[{"head": 0, "device": 0, "share": -1}]]}, "share must be in"),
        ({"num_devices": "two"}, "num_devices must be of type int, got 'two'"),
        ({"num_heads": "five"}, "num_heads must be of type int"),
        ({"step_seconds": None}, "step_seconds must be of type int or float"),
        ({"cost": {}}, "cost lacks a_seconds"),
        (
            {"layers": [[{"head": 0, "device": 0, "share": 0.5}] * 2], "num_heads": 1},
            "assigns a head twice",
        ),
    ],
)
def test_bad_files_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        Plan.from_json(json.dumps(_record() | change))


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_what_is_no_plan_is_refused(text):
    with pytest.raises(ValueError, match=r"plan (is not JSON|must be a JSON object)"):
        Plan.from_json(text)


def test_slots_hold_heads_in_order():
    plan = make_plan(PROFILE, 2, cost=CostModel(0.0, 1e-9, batch=16))
    for layer, copies in zip(plan.head_of_slot(), plan.layers, strict=True):
        for device, heads in enumerate(layer):
            filled = heads[heads >= 0].tolist()
            assert filled == sorted(copy.head for copy in copies if copy.device == device)
            assert (heads[len(filled) :] == -1).all()
