"""Decode attention over a paged pool with a length per (row, slot).

The contract of every implementation:

    ragged_decode(q [B,C,G,H], k_pages, v_pages [pages,page_size,H],
                  page_table [B,C,max_pages] int32, lengths [B,C] int32) -> o [B,C,G,H]

accumulated in float32 and scaled by 1/sqrt(H); a length of 0 gives zeros, and what lies behind a
length is never read into the result. `append_and_decode` writes each owned row's new key and value
first, and attends over them too: that is what a decode step calls.

Implementations are tried in the order that the kind of device lists (`devices/`); one that cannot
take the input raises NotImplementedError, and the next is tried.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from fairkv_jax.pallas.ragged_decode.reference import Pool
from fairkv_jax.pallas.ragged_decode.registry import IMPLEMENTATIONS, Implementation
from fairkv_jax.pallas.ragged_decode.tiles import Device, device_tiles

AUTO = "auto"
BACKENDS = (AUTO, *IMPLEMENTATIONS)

__all__ = [
    "AUTO",
    "BACKENDS",
    "Device",
    "Pool",
    "append_and_decode",
    "check_backend",
    "device_of",
    "ragged_decode",
]


def ragged_decode(
    q: Float[Array, "B C G H"],
    k_pages: Float[Array, "pages page_size H"],
    v_pages: Float[Array, "pages page_size H"],
    page_table: Int[Array, "B C max_pages"],
    lengths: Int[Array, "B C"],
    *,
    backend: str = AUTO,
    device: Device | None = None,
) -> Float[Array, "B C G H"]:
    """Softmax attention of one query token per row over that row's cached tokens.

    Args:
        backend: one of `BACKENDS`; all but "auto" force that implementation.
        device: what the call will run on; None: JAX's default device.

    Raises:
        ValueError: no such backend, or shapes that do not fit each other.
        NotImplementedError: the forced backend cannot take this input.
    """
    _check_shapes(q, (k_pages, v_pages), page_table, lengths)
    device = device or device_of()
    return _first(
        backend, device, lambda i: i.decode(q, k_pages, v_pages, page_table, lengths, device)
    )


def append_and_decode(
    q: Float[Array, "B C G H"],
    k: Float[Array, "B C H"],
    v: Float[Array, "B C H"],
    pool: Pool,
    page_table: Int[Array, "B C max_pages"],
    lengths: Int[Array, "B C"],
    *,
    backend: str = AUTO,
    device: Device | None = None,
) -> tuple[Float[Array, "B C G H"], Pool]:
    """Appends k and v behind `lengths` tokens of every owned row, and attends over all of them.

    The page table has a page for the new token already. Arguments and errors as `ragged_decode`.
    """
    _check_shapes(q, pool, page_table, lengths)
    device = device or device_of()
    return _first(
        backend, device, lambda i: i.append_and_decode(q, k, v, pool, page_table, lengths, device)
    )


def device_of(mesh: Mesh | None = None) -> Device:
    """What the mesh is made of; without one, JAX's default device."""
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    return Device("cpu" if device.platform == "cpu" else "gpu", device.device_kind)


def check_backend(backend: str) -> None:
    """Raises ValueError when there is no such backend."""
    if backend not in BACKENDS:
        raise ValueError(f"attention_backend must be one of {', '.join(BACKENDS)}, got {backend!r}")


def _check_shapes(q: Any, pool: Pool, page_table: Any, lengths: Any) -> None:
    """A kernel would read whatever lies there."""
    k_pages, v_pages = pool
    owners = q.shape[:2] == page_table.shape[:2] == lengths.shape
    if not owners or k_pages.shape != v_pages.shape or k_pages.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"shapes do not fit: q [B,C,G,H] {q.shape}, pages [pages,page_size,H] "
            f"{k_pages.shape} and {v_pages.shape}, page_table [B,C,max_pages] "
            f"{page_table.shape}, lengths [B,C] {lengths.shape}"
        )


def _first(backend: str, device: Device, call: Callable[[Implementation], Any]) -> Any:
    """The result of the first implementation that takes the input."""
    reasons = []
    for name in _order(backend, device):
        try:
            return call(IMPLEMENTATIONS[name])
        except NotImplementedError as error:
            reasons.append(f"{name}: {error}")
    raise NotImplementedError(
        f"no attention backend takes this input on {device.kind} ({'; '.join(reasons)}): "
        f"use attention_backend {AUTO!r}"
    )


def _order(backend: str, device: Device) -> Iterator[str]:
    """The implementations to try; on CPU a kernel would only be interpreted."""
    check_backend(backend)
    if backend != AUTO:
        yield backend
    elif device.platform == "cpu":
        yield "reference"
    else:
        yield from device_tiles(device.kind).order
