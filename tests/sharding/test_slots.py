"""From a plan to slots, and weights in slot order on the devices."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from fairkv_jax.checkpoint import open_checkpoint
from fairkv_jax.plan import Plan, Profile, make_plan
from fairkv_jax.sharding.load_weights import load_model
from fairkv_jax.sharding.mesh import RULES, make_mesh, spec
from fairkv_jax.sharding.slots import EMPTY, SlotLayout

TOKENS = ((90.0, 30.0, 20.0), (10.0, 25.0, 80.0))


def tiny_plan(strategy: str, num_devices: int) -> Plan:
    profile = Profile(model="", policy="full", budget=None, tokens=TOKENS)
    return make_plan(profile, num_devices, strategy)


PLANS = [
    (strategy, num_devices)
    for num_devices in (1, 2, 3, 4, 8)
    for strategy in ("static", "best_effort", "fair_copying")
]


@pytest.mark.parametrize(("strategy", "num_devices"), PLANS)
def test_layouts_hold_what_the_plan_says(strategy: str, num_devices: int):
    plan = tiny_plan(strategy, num_devices)
    layout = SlotLayout.from_plan(plan)
    assert layout.num_slots == plan.slots * num_devices
    np.testing.assert_array_equal(layout.replicas, plan.replicas())
    for layer, heads in enumerate(layout.head_of_slot):
        for slot, head in enumerate(heads):
            device = slot // layout.slots_per_device
            if head != EMPTY:
                assert plan.replicas()[layer, head, device]
                assert layout.slot_of_head[layer, head, device] == slot
        assert np.count_nonzero(heads != EMPTY) == plan.replicas()[layer].sum()
        for head in range(3):
            assert layout.first_slot[layer, head] == np.flatnonzero(heads == head)[0]


@pytest.mark.parametrize(
    ("strategy", "num_devices"), [("static", 2), ("fair_copying", 3), ("fair_copying", 8)]
)
def test_every_device_holds_its_heads_and_its_part_of_the_rest(
    tiny_checkpoint: Path, strategy: str, num_devices: int
):
    checkpoint = open_checkpoint(tiny_checkpoint)
    layout = SlotLayout.from_plan(tiny_plan(strategy, num_devices))
    mesh = make_mesh(num_devices)
    model: Any = load_model(checkpoint, layout, mesh, "float32", progress=False)
    qkv, out = model.layers.attention.qkv.get_value(), model.layers.attention.out.get_value()
    assert {s.data.shape[2] for s in qkv.addressable_shards} == {layout.slots_per_device}
    for layer, heads in enumerate(layout.head_of_slot):
        q, k, v, o = (checkpoint.tensor(f"layers.{layer}.{name}") for name in "qkvo")
        for slot, head in enumerate(heads):
            got = np.moveaxis(np.asarray(qkv[layer, :, slot]), 0, -1)
            if head == EMPTY:
                assert not got.any()
                assert not np.asarray(out[layer, slot]).any()
                continue
            np.testing.assert_array_equal(got, [*q[head], k[head], v[head]])
            np.testing.assert_array_equal(out[layer, slot], o[head])
    mlp = model.layers.mlp
    gate_up, down = mlp.gate_up.get_value(), mlp.down.get_value()
    for stack in (gate_up, down):
        assert len({s.data.shape for s in stack.addressable_shards}) == 1
    gate, up = (np.asarray(gate_up[1, :, index]).T for index in (0, 1))
    for name, got in {"gate": gate, "up": up, "down": np.asarray(down[1])}.items():
        stored = checkpoint.tensor(f"layers.1.{name}")
        np.testing.assert_array_equal(got[: len(stored)], stored)
        assert not got[len(stored) :].any()
    embed = checkpoint.tensor("embed")
    np.testing.assert_array_equal(model.embed.get_value()[: len(embed)], embed)


def test_weights_are_cast_on_their_way(tiny_checkpoint: Path):
    checkpoint = open_checkpoint(tiny_checkpoint)
    layout = SlotLayout.from_plan(tiny_plan("static", 2))
    model = load_model(checkpoint, layout, make_mesh(2), "bfloat16", progress=False)
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jax.numpy.bfloat16.dtype}


def test_meshes():
    assert make_mesh(3).shape == {"data": 1, "tensor": 3}
    with pytest.raises(ValueError, match=r"tensor_parallel_size 99 needs 99 devices, but 8 cpu"):
        make_mesh(99)


def test_logical_axes_map_to_mesh_axes():
    assert spec("slot", None, "model") == jax.sharding.PartitionSpec("tensor", None, None)
    assert set(RULES.values()) == {"tensor", None}
    with pytest.raises(KeyError):
        spec("no such axis")
