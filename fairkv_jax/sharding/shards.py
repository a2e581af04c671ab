"""The local shards of one array while they are filled, layer by layer.

CPU             NumPy arrays that become the devices' own memory without another copy
accelerators    one layer's part on the host, written into the stack on the device
"""

from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

_ALIGNMENT = 64  # bytes; XLA uses only memory aligned like this in place


class Shards(Protocol):
    """An array of which every local device gets a part."""

    def open(self, layer: int | None) -> dict[int, np.ndarray]:
        """Zeroed parts of one layer to fill, by the device's index along `tensor`.

        `layer=None`: the array has no layer axis.
        """
        ...

    def close(self, layer: int | None) -> None:
        """Marks the parts of that layer as filled."""
        ...

    def array(self) -> jax.Array:
        """The array, once all layers are filled."""
        ...


def make_shards(shape: jax.ShapeDtypeStruct, sharding: NamedSharding) -> Shards:
    """Makes the kind of shards that suits the devices."""
    on_host = all(device.platform == "cpu" for device in sharding.device_set)
    return (HostShards if on_host else DeviceShards)(shape, sharding)


class HostShards:
    """Fills memory that JAX's CPU devices then use in place."""

    def __init__(self, shape: jax.ShapeDtypeStruct, sharding: NamedSharding):
        self._shape, self._sharding = shape, sharding
        local = sharding.shard_shape(shape.shape)
        self._devices = local_devices(sharding)
        self._parts = {i: _aligned_zeros(local, shape.dtype) for i in self._devices}

    def open(self, layer: int | None) -> dict[int, np.ndarray]:
        if layer is None:
            return self._parts
        return {device_index: part[layer] for device_index, part in self._parts.items()}

    def close(self, layer: int | None) -> None:
        pass

    def array(self) -> jax.Array:
        parts = [jax.device_put(self._parts[i], device) for i, device in self._devices.items()]
        self._parts = {}
        return _joined(self._shape, self._sharding, parts)


class DeviceShards:
    """Keeps one layer's parts on the host, and copies them to the devices once they are filled."""

    def __init__(self, shape: jax.ShapeDtypeStruct, sharding: NamedSharding):
        self._shape, self._sharding = shape, sharding
        local = sharding.shard_shape(shape.shape)
        self._devices = local_devices(sharding)
        self._stacks = {
            device_index: jnp.zeros(local, shape.dtype, device=device)
            for device_index, device in self._devices.items()
        }
        self._parts: dict[int, np.ndarray] = {}

    def open(self, layer: int | None) -> dict[int, np.ndarray]:
        local = self._sharding.shard_shape(self._shape.shape)
        part_shape = local if layer is None else local[1:]
        if not self._parts:
            self._parts = {i: np.zeros(part_shape, self._shape.dtype) for i in self._devices}
        for part in self._parts.values():
            part[...] = 0
        return self._parts

    def close(self, layer: int | None) -> None:
        for device_index, device in self._devices.items():
            part = jax.device_put(self._parts[device_index], device, may_alias=False)
            stack = self._stacks[device_index]
            self._stacks[device_index] = part if layer is None else _write_layer(stack, part, layer)
        # The parts are filled again for the next layer, so the copies must have finished.
        jax.block_until_ready(self._stacks)

    def array(self) -> jax.Array:
        self._parts = {}
        return _joined(self._shape, self._sharding, list(self._stacks.values()))


def local_devices(sharding: NamedSharding) -> dict[int, Any]:
    """This process's devices, by their index along the `tensor` axis."""
    here = sharding.addressable_devices
    everywhere: Any = sharding.mesh.devices
    return {index: device for index, device in enumerate(everywhere.flat) if device in here}


def in_order(values: np.ndarray) -> np.ndarray:
    """The same values, contiguous along the last axis; XLA transposes far faster than NumPy."""
    if values.ndim < 2 or values.strides[-1] == values.itemsize:
        return values
    return np.asarray(jax.device_put(values, jax.local_devices(backend="cpu")[0]))


def _joined(
    shape: jax.ShapeDtypeStruct, sharding: NamedSharding, parts: list[jax.Array]
) -> jax.Array:
    return jax.make_array_from_single_device_arrays(shape.shape, sharding, parts)


def _aligned_zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros that XLA can use in place; the system allocates their pages as they are written."""
    num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(num_bytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + num_bytes].view(dtype).reshape(shape)


@partial(jax.jit, donate_argnums=0)
def _write_layer(stack: jax.Array, part: jax.Array, layer: int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, part, layer, 0)
