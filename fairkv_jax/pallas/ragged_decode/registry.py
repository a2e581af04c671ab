"""The implementations of ragged decode attention by name, each with the tile of the device."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Array

from fairkv_jax.pallas.ragged_decode import reference, triton
from fairkv_jax.pallas.ragged_decode.tiles import Device, TritonTile, device_tiles


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


def _by_triton(operation: Callable[..., Any]) -> Callable[..., Any]:
    """On CPU the kernels are interpreted, which shows what they compute, not how fast."""

    def call(q: Array, *args: Any) -> Any:
        *arrays, device = args
        tile = _triton_tile(device, q)
        return operation(q, *arrays, tile=tile, interpret=device.platform == "cpu")

    return call


def _triton_tile(device: Device, q: Array) -> TritonTile:
    return TritonTile(**device_tiles(device.kind).get("triton", q.dtype.itemsize, q.shape[-1]))


IMPLEMENTATIONS = {
    "reference": Implementation(
        _by_reference(reference.ragged_decode), _by_reference(reference.append_and_decode)
    ),
    "triton": Implementation(
        _by_triton(triton.ragged_decode), _by_triton(triton.append_and_decode)
    ),
}
