"""Loading: every row once, only what is held here, little memory beside it, int8 on the way."""

import dataclasses
import tracemalloc
from collections import Counter
from typing import Any

import jax
import numpy as np
import pytest

from fairkv_jax.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from fairkv_jax.checkpoint.base import LazyTensor
from fairkv_jax.checkpoint.convert import convert
from fairkv_jax.checkpoint.gguf_file import GGUFFile
from fairkv_jax.models.params import device_bytes, param_specs
from fairkv_jax.plan import Plan, Profile, make_plan
from fairkv_jax.sharding import load_weights, shards
from fairkv_jax.sharding.load_weights import load_model
from fairkv_jax.sharding.mesh import make_mesh
from fairkv_jax.sharding.quantize import quantize_columns, quantize_rows
from fairkv_jax.sharding.slots import SlotLayout
from tests.oracle.tiny import write_tiny_checkpoint
from tests.oracle.tiny_hf import write_tiny_folder


def skewed_plan(checkpoint: Checkpoint, num_devices: int) -> Plan:
    """A plan that copies the first head to several devices."""
    config = checkpoint.config
    tokens = np.ones((config.num_layers, config.num_kv_heads))
    tokens[:, 0] = 9
    profile = Profile(model="", policy="", budget=None, tokens=tuple(map(tuple, tokens.tolist())))
    plan = make_plan(profile, num_devices, "fair_copying")
    assert plan.replicas()[:, 0].sum(-1).max() > 1
    return plan


class Counting:
    """A checkpoint that counts how often each row is read."""

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint
        self.reads: Counter[tuple[str, int]] = Counter()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checkpoint, name)

    def lazy(self, name: str) -> LazyTensor:
        tensor = self._checkpoint.lazy(name)

        def read(start: int, stop: int) -> np.ndarray:
            self.reads.update((name, row) for row in range(start, stop))
            return tensor.read(start, stop)

        return dataclasses.replace(tensor, read=read)


@pytest.mark.parametrize("int8", [False, True])
def test_every_row_is_read_once_though_heads_have_copies(tiny_checkpoint, int8):
    checkpoint: Any = Counting(open_checkpoint(tiny_checkpoint))
    layout = SlotLayout.from_plan(skewed_plan(checkpoint, 4))
    load_model(checkpoint, layout, make_mesh(4), "float32", int8=int8, progress=False)
    rows = {
        (name, row) for name in checkpoint.names() for row in range(checkpoint.lazy(name).shape[0])
    }
    assert checkpoint.reads.keys() == rows
    assert set(checkpoint.reads.values()) == {1}


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("name", ["embed", "layers.1.down", "layers.0.q", "layers.1.attn_norm"])
def test_numbers_that_are_not_finite_are_refused_by_name(tiny_checkpoint, tmp_path, name, int8):
    checkpoint = open_checkpoint(tiny_checkpoint)
    stored = param_specs(checkpoint.config)[name].gguf_name
    info = GGUFFile(tiny_checkpoint).tensors[stored]
    path = tmp_path / "damaged.gguf"
    content = bytearray(tiny_checkpoint.read_bytes())
    content[info.offset + 100 : info.offset + 140] = b"\xff" * 40
    path.write_bytes(content)
    damaged = open_checkpoint(path)
    layout = SlotLayout.from_plan(skewed_plan(damaged, 2))
    with pytest.raises(CheckpointError, match=f"'{name}' holds .* not finite"):
        load_model(damaged, layout, make_mesh(2), "float32", int8=int8, progress=False)
    with pytest.raises(CheckpointError, match=f"'{name}' holds .* not finite"):
        convert(damaged, tmp_path / "converted")
    assert not list(tmp_path.glob("*converted*"))


class OneDevice(shards.HostShards):
    """The shards of a process that has one of the devices."""

    device_index = 1

    def open(self, layer: int | None) -> dict[int, np.ndarray]:
        return {self.device_index: super().open(layer)[self.device_index]}


def test_a_process_reads_only_what_its_devices_hold(tiny_checkpoint, monkeypatch):
    checkpoint: Any = Counting(open_checkpoint(tiny_checkpoint))
    layout = SlotLayout.from_plan(skewed_plan(checkpoint, 3))
    monkeypatch.setattr(load_weights, "make_shards", OneDevice)
    monkeypatch.setattr("fairkv_jax.checkpoint.base.BLOCK_VALUES", 1)  # a row a block
    load_model(checkpoint, layout, make_mesh(3), "float32", progress=False)
    slots = layout.slots_per_device
    held = layout.head_of_slot[:, slots : 2 * slots]
    for layer, heads in enumerate(held):
        for name in ("q", "k", "v", "o"):
            rows = {row for read, row in checkpoint.reads if read == f"layers.{layer}.{name}"}
            assert rows == set(heads.tolist()) - {-1}
    assert {row for name, row in checkpoint.reads if name == "layers.1.down"} == set(range(32, 64))
    assert {row for name, row in checkpoint.reads if name == "embed"} == set(range(128, 256))


def test_accelerators_get_the_same_parts_layer_by_layer(tiny_checkpoint, monkeypatch):
    checkpoint = open_checkpoint(tiny_checkpoint)
    layout = SlotLayout.from_plan(skewed_plan(checkpoint, 3))
    args = (checkpoint, layout, make_mesh(3), "bfloat16")
    on_host = load_model(*args, progress=False)
    monkeypatch.setattr(load_weights, "make_shards", shards.DeviceShards)
    on_device = load_model(*args, progress=False)
    for one, other in zip(*map(jax.tree.leaves, (on_host, on_device)), strict=True):
        assert one.sharding == other.sharding
        np.testing.assert_array_equal(one, other)


def test_the_host_holds_less_than_the_largest_tensor_beside_the_devices(tmp_path):
    gguf = write_tiny_checkpoint(
        tmp_path / "m.gguf", hidden_size=512, intermediate_size=3000, vocab_size=8192, head_dim=64
    )
    folder = write_tiny_folder(tmp_path / "m", gguf, dtype="BF16")
    checkpoint = open_checkpoint(folder)
    layout = SlotLayout.from_plan(skewed_plan(checkpoint, 2))
    largest = max(checkpoint.stored(name).num_bytes for name in checkpoint.names())
    mesh = make_mesh(2)
    tracemalloc.start()
    try:
        model = load_model(checkpoint, layout, mesh, "bfloat16", progress=False)
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < peak < held + largest


def test_the_bar_counts_the_bytes_of_the_file(tiny_checkpoint, capsys):
    checkpoint = open_checkpoint(tiny_checkpoint)
    layout = SlotLayout.from_plan(skewed_plan(checkpoint, 2))
    load_model(checkpoint, layout, make_mesh(2), "float32")
    total = sum(checkpoint.stored(name).num_bytes for name in checkpoint.names())
    assert f"{total / 1000:.0f}k/{total / 1000:.0f}k" in capsys.readouterr().err


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma"])
def test_what_a_device_needs_is_what_it_gets(tmp_path, architecture, int8):
    path = write_tiny_checkpoint(
        tmp_path / "m.gguf", architecture=architecture, tie_word_embeddings=False, vocab_size=385
    )
    checkpoint = open_checkpoint(path)
    plan = skewed_plan(checkpoint, 2)
    args = (checkpoint, SlotLayout.from_plan(plan), make_mesh(2), "bfloat16")
    model = load_model(*args, int8=int8, progress=False)
    held = sum(leaf.addressable_shards[1].data.nbytes for leaf in jax.tree.leaves(model))
    needs = device_bytes(checkpoint.config, plan.slots, plan.num_devices, 2, int8=int8)
    assert sum(needs.values()) == held


def check_rounding(values: np.ndarray, int8: np.ndarray, scales: np.ndarray) -> None:
    assert int8.dtype == np.int8
    assert scales.dtype == np.float32
    assert np.all(np.abs(values - int8 * scales) <= scales * 0.5001)


def test_rounding_of_rows_and_columns():
    values = np.random.default_rng(0).standard_normal((7, 3, 50), dtype=np.float32)
    values[2, 1] = 0
    int8, scales = quantize_rows(values)
    check_rounding(values, int8, scales[..., None])
    assert np.all(np.abs(int8).max(-1)[scales > 0] == 127)
    assert not int8[2, 1].any()
    tensor = LazyTensor(values.shape, 2, lambda start, stop: values[start:stop])
    int8, scales = quantize_columns(tensor)
    whole = np.concatenate([int8.read(start, min(start + 2, 7)) for start in range(0, 7, 2)])
    check_rounding(values, whole, scales.whole())
    assert np.all(np.abs(whole).max((0, 1)) == 127)
