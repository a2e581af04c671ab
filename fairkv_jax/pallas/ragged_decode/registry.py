"""The implementations of ragged decode attention by name, each with the tile of the device."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from jaxtyping import Array

from fairkv_jax.pallas.ragged_decode import reference
from fairkv_jax.pallas.ragged_decode.tiles import MosaicTile, Tile, TritonTile, device_tiles


@dataclass(frozen=True)
class Implementation:
    """The two operations; the last argument of both is the device."""

    decode: Callable[..., Any]
    append_and_decode: Callable[..., Any]


def _by_reference(operation: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        *arrays, _device = args
        return operation(*arrays)

    return call


def _by_kernel(backend: str, tile_type: type[Tile], operation: str) -> Callable[..., Any]:
    """Calls a kernel with the device's tile; on CPU it is interpreted, for tests.

    The backend's file is imported at the first call, because the parts of JAX that it needs are
    slow to load and missing from some installations.
    """

    def call(q: Array, *args: Any) -> Any:
        *arrays, device = args
        tiles = device_tiles(device.kind)
        tile = tile_type(**tiles.get(backend, q.dtype.itemsize, q.shape[-1]))
        try:
            kernels = import_module(f"fairkv_jax.pallas.ragged_decode.{backend}")
        except ImportError as error:
            raise NotImplementedError(f"this JAX lacks what it needs: {error}") from error
        run = getattr(kernels, operation)
        return run(q, *arrays, tile=tile, interpret=device.platform == "cpu")

    return call


def _kernels(backend: str, tile_type: type[Tile]) -> Implementation:
    return Implementation(
        _by_kernel(backend, tile_type, "ragged_decode"),
        _by_kernel(backend, tile_type, "append_and_decode"),
    )


IMPLEMENTATIONS = {
    "reference": Implementation(
        _by_reference(reference.ragged_decode), _by_reference(reference.append_and_decode)
    ),
    "triton": _kernels("triton", TritonTile),
    "mosaic": _kernels("mosaic", MosaicTile),
}
