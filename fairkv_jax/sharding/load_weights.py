"""Loads weights from a checkpoint, in head order, onto the devices, in slot order.

    checkpoint, a block of rows --> int8 if requested --> every local shard that holds the rows

A row is an entry of a tensor's leading axis: a KV head, an MLP channel or a token. Every block is
read once, and only if a device of this process holds one of its rows. Threads read the blocks of a
tensor concurrently: reading, rounding and copying release Python's global lock.
"""

import os
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from fairkv_jax.checkpoint import Checkpoint
from fairkv_jax.checkpoint.base import LazyTensor, check_finite
from fairkv_jax.models.decoder import abstract_model
from fairkv_jax.models.model import Model
from fairkv_jax.models.params import MLP, MODEL, SLOT, VOCAB, ParamSpec, Within, param_specs
from fairkv_jax.models.quantized import QuantizedArray
from fairkv_jax.sharding.mesh import spec
from fairkv_jax.sharding.quantize import quantize_columns, quantize_rows
from fairkv_jax.sharding.shards import Shards, in_order, make_shards
from fairkv_jax.sharding.slots import SlotLayout

NUM_THREADS = min(16, 2 * (os.cpu_count() or 1))


def partition_specs(model: Model) -> Model:
    """The partition of every parameter by its logical axes; layer axes are not split."""

    def partition(array: Any, axes: tuple[str, ...]) -> PartitionSpec:
        stacked = (None,) * (len(array.shape) - len(axes))
        return PartitionSpec(*stacked, *spec(*axes))

    def partition_param(param: nnx.Variable) -> nnx.Variable:
        value = param.get_value()
        if not isinstance(value, QuantizedArray):
            return param.replace(partition(value, param.axes))
        scales = partition(value.scales, param.output_axes)
        return param.replace(QuantizedArray(partition(value.values, param.axes), scales))

    return jax.tree.map(partition_param, model, is_leaf=_is_param)


def load_model(
    checkpoint: Checkpoint,
    layout: SlotLayout,
    mesh: Mesh,
    dtype: str,
    *,
    int8: bool = False,
    progress: bool = True,
) -> Model:
    """Reads a checkpoint block by block straight into the sharded parameters.

    The host holds at most one tensor in addition to what the devices hold. With `int8`, matrices
    are rounded to int8 with one scale per output channel.

    Raises:
        CheckpointError: a tensor cannot be read, or holds numbers that are not finite.
    """
    config = checkpoint.config
    model = abstract_model(config, layout.num_slots, layout.num_devices, dtype, int8=int8)
    total = sum(checkpoint.stored(name).num_bytes for name in checkpoint.names())
    with tqdm(total=total, desc="loading", unit="B", unit_scale=True, disable=not progress) as bar:
        shards = {
            id(param): jax.tree.map(
                lambda shape, part: make_shards(shape, NamedSharding(mesh, part)),
                param.get_value(),
                partition.get_value(),
            )
            for param, partition in zip(
                _params(model), _params(partition_specs(model)), strict=True
            )
        }
        with ThreadPoolExecutor(NUM_THREADS) as threads:
            loader = _Loader(checkpoint, layout, threads, bar)
            tensors = param_specs(config).values()
            for (path, layer), group in groupby(tensors, key=attrgetter("array", "layer")):
                param = attrgetter(path)(model)
                loader.load(param, shards[id(param)], layer, tuple(group))

        def finish(param: nnx.Variable) -> nnx.Variable:
            return param.replace(jax.tree.map(lambda part: part.array(), shards.pop(id(param))))

        return jax.tree.map(finish, model, is_leaf=_is_param)


def _is_param(value: Any) -> bool:
    return isinstance(value, nnx.Variable)


def _params(model: Model) -> list[nnx.Variable]:
    return jax.tree.leaves(model, is_leaf=_is_param)


class _Loader:
    """Fills the shards of one parameter after another."""

    def __init__(self, checkpoint: Checkpoint, layout: SlotLayout, threads: Executor, bar: tqdm):
        self._checkpoint, self._layout = checkpoint, layout
        self._threads, self._bar = threads, bar

    def load(
        self,
        param: nnx.Variable,
        shards: Shards | QuantizedArray,
        layer: int | None,
        tensors: tuple[ParamSpec, ...],
    ) -> None:
        """Fills a parameter, or one layer of it, with the tensors that it holds."""
        if not isinstance(shards, QuantizedArray):
            parts = shards.open(layer)
            for tensor in tensors:
                target = _Target(param.axes, parts, layer, tensor.within)
                self._copy(tensor.name, self._checkpoint.lazy(tensor.name), target)
            shards.close(layer)
            return
        parts, scales = shards.values.open(layer), shards.scales.open(layer)
        for tensor in tensors:
            target = _Target(param.axes, parts, layer, tensor.within)
            scale_target = _Target(param.output_axes, scales, layer, tensor.within)
            lazy = self._checkpoint.lazy(tensor.name)
            if tensor.is_stored_transposed:
                lazy, scales_of_columns = quantize_columns(lazy)
                # The scale of a channel that holds a number that is not finite is not, either.
                self._copy(tensor.name, scales_of_columns, scale_target, counts=False)
                self._copy(tensor.name, lazy, target)
            else:
                self._copy(tensor.name, lazy, target, scale_target)
        shards.values.close(layer)
        shards.scales.close(layer)

    def _copy(
        self,
        name: str,
        tensor: LazyTensor,
        target: "_Target",
        scale_target: "_Target | None" = None,
        *,
        counts: bool = True,
    ) -> None:
        """Copies every block to the shards that hold its rows, in int8 if there are scales.

        The progress bar advances by the tensor's bytes, if `counts`.
        """
        rows = tensor.shape[0]
        num_bytes = self._checkpoint.stored(name).num_bytes if counts else 0

        def copy(start: int) -> int:
            stop = min(start + tensor.block, rows)
            owners = list(target.owners(self._layout, start, stop))
            if owners:
                values = check_finite(tensor.read(start, stop), self._checkpoint, name)
                if scale_target is not None:
                    values, scales = quantize_rows(values)
                    scale_target.fill(owners, scales)
                target.fill(owners, values)
            return num_bytes * stop // rows - num_bytes * start // rows

        for copied in self._threads.map(copy, range(0, rows, tensor.block)):
            self._bar.update(copied)


_Owner = tuple[int, slice, slice]
"""A device's index, rows of its shard, and the rows of a block that belong there."""


@dataclass(frozen=True)
class _Target:
    """The local shards of an array that a tensor fills."""

    axes: tuple[str, ...]
    parts: dict[int, np.ndarray]
    """By the device's index along `tensor`."""
    layer: int | None
    within: Within | None
    """Which part of the array the tensor fills; None if it fills the array alone."""

    def owners(self, layout: SlotLayout, start: int, stop: int) -> Iterator[_Owner]:
        """The devices of this process that hold rows of [start, stop)."""
        if SLOT in self.axes:
            for slot, head in enumerate(layout.head_of_slot[self.layer]):
                device_index, local = divmod(slot, layout.slots_per_device)
                if start <= head < stop and device_index in self.parts:
                    taken = slice(head - start, head - start + 1)
                    yield device_index, slice(local, local + 1), taken
            return
        is_split = MLP in self.axes or VOCAB in self.axes
        for device_index, part in self.parts.items():
            size = part.shape[self.axes.index(self._row_axis)] if is_split else stop
            first = device_index * size if is_split else 0
            low, high = max(start, first), min(stop, first + size)
            if low < high:
                rows, taken = slice(low - first, high - first), slice(low - start, high - start)
                yield device_index, rows, taken

    @property
    def _row_axis(self) -> str:
        """The array's axis that is the tensor's leading one."""
        return next((axis for axis in self.axes if axis in (SLOT, MLP, VOCAB)), self.axes[0])

    def fill(self, owners: list[_Owner], values: np.ndarray) -> None:
        """Copies a block [rows, ...] to its owners, in the order of the array's axes."""
        before: tuple[slice, ...] = ()
        if self.axes[0] == MODEL and values.ndim > 1:
            values, before = np.moveaxis(values, -1, 0), (slice(None),)
        values = in_order(values)
        for device_index, rows, taken in owners:
            places: dict[str, slice | int] = {self._row_axis: rows}
            if self.within is not None:
                places[self.within.axis] = self.within.entries
            index = tuple(places.get(axis, slice(None)) for axis in self.axes)
            part = self.parts[device_index][index]
            np.copyto(part, values[(*before, taken)], casting="unsafe")
