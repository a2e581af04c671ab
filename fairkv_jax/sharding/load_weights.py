"""Weights from a checkpoint, in head order, to the devices, in slot order.

    checkpoint, a block of rows --> int8 where asked for --> every local shard that holds them

A row of a tensor's leading axis is a KV head, a channel of the MLP, or a token. Every block is
read once, and only if a device of this process holds one of its rows. Threads share the blocks of
a tensor out: reading, rounding and copying leave Python to itself.
"""

import os
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from fairkv_jax.checkpoint import Checkpoint
from fairkv_jax.checkpoint.base import LazyTensor
from fairkv_jax.models import Llama
from fairkv_jax.sharding.mesh import spec
from fairkv_jax.sharding.quantize import quantize_columns, quantize_rows
from fairkv_jax.sharding.shards import Shards, in_order, make_shards
from fairkv_jax.sharding.slots import SlotLayout

NUM_THREADS = min(16, 2 * (os.cpu_count() or 1))


def abstract_model(
    checkpoint: Checkpoint, layout: SlotLayout, dtype: str, *, int8: bool = False
) -> Llama:
    """The model with shapes in place of arrays."""
    sizes = (layout.num_slots, layout.num_devices, jnp.dtype(dtype))
    return nnx.eval_shape(lambda: Llama(checkpoint.config, *sizes, int8=int8))


def partition_specs(model: Llama) -> Llama:
    """The partition of every parameter, by its logical axes; leading layer axes are not split."""

    def partition(variable: nnx.Variable) -> nnx.Variable:
        stacked = (None,) * (len(variable.get_value().shape) - len(variable.axes))
        return variable.replace(PartitionSpec(*stacked, *spec(*variable.axes)))

    return jax.tree.map(partition, model, is_leaf=lambda x: isinstance(x, nnx.Variable))


def load_model(
    checkpoint: Checkpoint,
    layout: SlotLayout,
    mesh: Mesh,
    dtype: str,
    *,
    int8: bool = False,
    progress: bool = True,
) -> Llama:
    """Reads the checkpoint block by block straight into the sharded parameters.

    Beside what the devices hold, the host holds one tensor at most. With `int8`, matrices are
    rounded to int8, with a scale for each channel.

    Raises:
        CheckpointError: a tensor cannot be read.
    """
    shapes = abstract_model(checkpoint, layout, dtype, int8=int8)
    specs = partition_specs(shapes)
    names = checkpoint.names()
    total = sum(checkpoint.stored(name).num_bytes for name in names)
    with tqdm(total=total, desc="loading", unit="B", unit_scale=True, disable=not progress) as bar:
        shards = {
            id(param): make_shards(param.get_value(), NamedSharding(mesh, part.get_value()))
            for param, part in zip(_params(shapes), _params(specs), strict=True)
        }
        with ThreadPoolExecutor(NUM_THREADS) as threads:
            loader = _Loader(checkpoint, layout, shards, threads, bar)
            for weights in _weights(shapes, checkpoint.config.num_layers):
                loader.load(weights)
        return jax.tree.map(
            lambda param: param.replace(shards.pop(id(param)).array()), shapes, is_leaf=_is_param
        )


def _is_param(value: Any) -> bool:
    return isinstance(value, nnx.Variable)


def _params(model: Llama) -> list[nnx.Variable]:
    return jax.tree.leaves(model, is_leaf=_is_param)


@dataclass(frozen=True)
class _Weights:
    """A parameter, one layer of it where it has layers, and the tensors that make it up."""

    param: nnx.Param
    scales: nnx.Param | None
    layer: int | None
    tensors: dict[str, Any]
    """By name, which of a slot's heads it is; ... stands for all that a row has."""


def _weights(model: Llama, num_layers: int) -> Iterator[_Weights]:
    """All parameters of the model, in the order in which the checkpoint is read."""
    yield _Weights(model.embed, model.embed_scales, None, {"embed": ...})
    for layer in range(num_layers):
        for param, scales, tensors in _layer_weights(model):
            named = {f"layers.{layer}.{name}": heads for name, heads in tensors.items()}
            yield _Weights(param, scales, layer, named)
    yield _Weights(model.norm.scale, None, None, {"norm": ...})
    if not model.config.tie_word_embeddings:
        yield _Weights(model.unembed, model.unembed_scales, None, {"unembed": ...})


def _layer_weights(model: Llama) -> Iterator[tuple[nnx.Param, nnx.Param | None, dict[str, Any]]]:
    layers, group = model.layers, model.config.group_size
    attention, mlp = layers.attention, layers.mlp
    qkv = {"q": slice(group), "k": group, "v": group + 1}
    yield layers.attn_norm.scale, None, {"attn_norm": ...}
    yield attention.qkv, attention.qkv_scales, qkv
    if attention.bias is not None:
        yield attention.bias, None, {f"{name}_bias": heads for name, heads in qkv.items()}
    if attention.q_norm is not None and attention.k_norm is not None:
        yield attention.q_norm.scale, None, {"q_norm": ...}
        yield attention.k_norm.scale, None, {"k_norm": ...}
    yield attention.out, attention.out_scales, {"o": ...}
    yield layers.mlp_norm.scale, None, {"mlp_norm": ...}
    yield mlp.gate, mlp.gate_scales, {"gate": ...}
    yield mlp.up, mlp.up_scales, {"up": ...}
    yield mlp.down, mlp.down_scales, {"down": ...}


class _Loader:
    """Fills the shards of one parameter after another."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        layout: SlotLayout,
        shards: dict[int, Shards],
        threads: Executor,
        bar: tqdm,
    ):
        self._checkpoint, self._layout, self._shards = checkpoint, layout, shards
        self._threads, self._bar = threads, bar

    def load(self, weights: _Weights) -> None:
        parts = self._open(weights.param, weights.layer)
        scales = {} if weights.scales is None else self._open(weights.scales, weights.layer)
        for name, heads in weights.tensors.items():
            target = _Target(weights.param.axes, parts, weights.layer, heads)
            tensor = self._checkpoint.lazy(name)
            if weights.scales is None:
                self._copy(name, tensor, target)
                continue
            scale_target = _Target(weights.scales.axes, scales, weights.layer, heads)
            if weights.scales.axes == ("model",):
                tensor, of_columns = quantize_columns(tensor)
                self._copy(name, tensor, target)
                self._copy(None, of_columns, scale_target)
            else:
                self._copy(name, tensor, target, scale_target)
        self._shards[id(weights.param)].close(weights.layer)
        if weights.scales is not None:
            self._shards[id(weights.scales)].close(weights.layer)

    def _open(self, param: nnx.Param, layer: int | None) -> dict[int, np.ndarray]:
        return self._shards[id(param)].open(layer)

    def _copy(
        self,
        name: str | None,
        tensor: LazyTensor,
        target: "_Target",
        scale_target: "_Target | None" = None,
    ) -> None:
        """Every block to the shards that hold its rows, in int8 where there are scales."""
        rows = tensor.shape[0]
        num_bytes = 0 if name is None else self._checkpoint.stored(name).num_bytes

        def copy(start: int) -> int:
            stop = min(start + tensor.block, rows)
            owners = list(target.owners(self._layout, start, stop))
            if owners:
                values = tensor.read(start, stop)
                if scale_target is not None:
                    values, scales = quantize_rows(values)
                    scale_target.fill(owners, scales)
                target.fill(owners, values)
            return num_bytes * stop // rows - num_bytes * start // rows

        for copied in self._threads.map(copy, range(0, rows, tensor.block)):
            self._bar.update(copied)


_Owner = tuple[int, slice, slice]
"""A device's place, rows of its shard, and which rows of a block they are."""


@dataclass(frozen=True)
class _Target:
    """The local parts of a parameter that a tensor goes to."""

    axes: tuple[str | None, ...]
    parts: dict[int, np.ndarray]
    layer: int | None
    heads: Any

    def owners(self, layout: SlotLayout, start: int, stop: int) -> Iterator[_Owner]:
        """Who holds the rows [start, stop), of the devices of this process."""
        if "slot" in self.axes:
            for slot, head in enumerate(layout.head_of_slot[self.layer]):
                place, local = divmod(slot, layout.slots_per_device)
                if start <= head < stop and place in self.parts:
                    yield place, slice(local, local + 1), slice(head - start, head - start + 1)
            return
        splits = "mlp" in self.axes or "vocab" in self.axes
        for place, part in self.parts.items():
            size = part.shape[self._row_axis] if splits else stop
            first = place * size if splits else 0
            low, high = max(start, first), min(stop, first + size)
            if low < high:
                yield place, slice(low - first, high - first), slice(low - start, high - start)

    @property
    def _row_axis(self) -> int:
        """Where a tensor's leading axis lies; matrices that put out rows have D before it."""
        return int(self.axes[0] == "model" and len(self.axes) > 1)

    def fill(self, owners: list[_Owner], values: np.ndarray) -> None:
        """Copies a block [rows, ...] to its owners, in the order of the parameter's axes."""
        if self._row_axis == 1:
            values = np.moveaxis(values, -1, 0)
        values = in_order(values)
        before = (slice(None),) * self._row_axis
        for place, rows, taken in owners:
            part = self.parts[place][(*before, rows, self.heads)]
            np.copyto(part, values[(*before, taken)], casting="unsafe")
