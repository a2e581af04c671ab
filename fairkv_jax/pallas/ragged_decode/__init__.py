"""Decode attention over a paged pool with a length per (layer, row, slot).

The contract of every implementation:

    ragged_decode(q [B,Q,C,G,H], k_pages, v_pages [pages,page_size,H], page_table, lengths,
                  layer=None, scales=None) -> o [B,Q,C,G,H]

- `lengths` counts the Q query tokens, which are causal among themselves: query i of Q sees the
  positions before length - Q + 1 + i. A length of 0 marks a row that the slot does not own, and
  gives zeros. Entries at or past a length never affect the result.
- With `layer`, the page table's `starts` and `lengths` are [L,B,C], and the kernels read them at
  that layer; with `layer=None` they are [B,C].
- Sums are in float32, and scores are scaled by 1/sqrt(H).
- With `scales`, the pages are int8, and token t of page p stands for k_pages[p,t] * k_scales[p,t]
  and v_pages[p,t] * v_scales[p,t].

`append_and_decode` first writes each owned row's new keys and values, in the type of the pages, and
attends over what it has written too: a decode step calls it.

Implementations are tried in the order that the kind of device lists (`devices/`). One that cannot
take the input raises NotImplementedError, and the next is tried.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Num

from fairkv_jax.pallas.ragged_decode.page_table import PageTable
from fairkv_jax.pallas.ragged_decode.pool import Pool, Scales, rounded_to_int8
from fairkv_jax.pallas.ragged_decode.registry import IMPLEMENTATIONS, Implementation
from fairkv_jax.pallas.ragged_decode.tiles import Device, device_tiles, is_kind

AUTO = "auto"
BACKENDS = (AUTO, *IMPLEMENTATIONS)

__all__ = [
    "AUTO",
    "BACKENDS",
    "Device",
    "PageTable",
    "Pool",
    "Scales",
    "append_and_decode",
    "check_backend",
    "device_of",
    "is_kind",
    "ragged_decode",
    "rounded_to_int8",
]


def ragged_decode(
    q: Float[Array, "B Q C G H"],
    k_pages: Num[Array, "pages page_size H"],
    v_pages: Num[Array, "pages page_size H"],
    page_table: PageTable,
    lengths: Int[Array, "*L B C"],
    layer: Int[Array, ""] | int | None = None,
    scales: Scales | None = None,
    *,
    backend: str = AUTO,
    device: Device | None = None,
) -> Float[Array, "B Q C G H"]:
    """Softmax attention of each row's last Q tokens over the row's cached tokens.

    Args:
        layer: The layer whose starts and lengths are read; None: they have no layer axis.
        scales: The scales of keys and values, where the pages are int8.
        backend: One of `BACKENDS`; every one but "auto" forces that implementation.
        device: The device that the call will run on; None: JAX's default device.

    Raises:
        ValueError: The backend is unknown, or the shapes do not fit each other.
        NotImplementedError: The forced backend cannot take this input.
    """
    _check_shapes(q, Pool(k_pages, v_pages, scales), page_table, lengths, layer)
    device = device or device_of()
    args = q, k_pages, v_pages, page_table, lengths, layer, scales
    return _first(backend, device, lambda i: i.decode(*args, device))


def append_and_decode(
    q: Float[Array, "B Q C G H"],
    k: Float[Array, "B Q C H"],
    v: Float[Array, "B Q C H"],
    pool: Pool,
    page_table: PageTable,
    lengths: Int[Array, "*L B C"],
    layer: Int[Array, ""] | int | None = None,
    *,
    backend: str = AUTO,
    device: Device | None = None,
) -> tuple[Float[Array, "B Q C G H"], Pool]:
    """Appends Q keys and values to every owned row, and attends over all of the row's tokens.

    `lengths` counts the tokens before the append; only rows with a length above 0 are written. The
    page table has pages for the new tokens already. Arguments and errors as `ragged_decode`.
    """
    _check_shapes(q, pool, page_table, lengths, layer)
    _check_new_tokens(q, k, v)
    device = device or device_of()
    args = q, k, v, pool, page_table, lengths, layer
    return _first(backend, device, lambda i: i.append_and_decode(*args, device))


def device_of(mesh: Mesh | None = None) -> Device:
    """The kind of the mesh's devices; without a mesh, that of JAX's default device."""
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    return Device("cpu" if device.platform == "cpu" else "gpu", device.device_kind)


def check_backend(backend: str) -> None:
    """Raises ValueError when there is no such backend."""
    if backend not in BACKENDS:
        raise ValueError(f"attention_backend must be one of {', '.join(BACKENDS)}, got {backend!r}")


def _check_shapes(q: Any, pool: Pool, page_table: PageTable, lengths: Any, layer: Any) -> None:
    """Raises ValueError where a kernel would read outside its arrays."""
    _check_scales(pool)
    k_pages, v_pages = pool.k_pages, pool.v_pages
    axes = "[B,C]" if layer is None else "[L,B,C]"
    rows_and_slots = (q.shape[0], q.shape[2]) if q.ndim == 5 else None
    fits = (
        rows_and_slots == lengths.shape[-2:]
        and lengths.ndim == (2 if layer is None else 3)
        and page_table.starts.shape == lengths.shape
        and page_table.num_entries > 0
        and k_pages.shape == v_pages.shape
        and k_pages.shape[-1] == q.shape[-1]
    )
    if not fits:
        raise ValueError(
            f"shapes do not fit: q [B,Q,C,G,H] {q.shape}, pages [pages,page_size,H] "
            f"{k_pages.shape} and {v_pages.shape}, page_table.pages [E] {page_table.pages.shape}, "
            f"page_table.starts {axes} {page_table.starts.shape}, lengths {axes} {lengths.shape}"
        )


def _check_new_tokens(q: Any, k: Any, v: Any) -> None:
    expected = (*q.shape[:3], q.shape[-1])
    if k.shape != expected or v.shape != expected:
        raise ValueError(
            f"new keys {k.shape} and values {v.shape} do not fit queries [B,Q,C,G,H] {q.shape}: "
            f"both must be [B,Q,C,H] {expected}"
        )


def _check_scales(pool: Pool) -> None:
    k_pages, scales = pool.k_pages, pool.scales
    shapes = {k_pages.shape[:2]} if scales is None else {scale.shape for scale in scales}
    if (k_pages.dtype.name == "int8") != (scales is not None) or shapes != {k_pages.shape[:2]}:
        given = "no scales" if scales is None else f"scales of shapes {[s.shape for s in scales]}"
        raise ValueError(
            f"pages of {k_pages.dtype} with {given}: int8 pages, and no others, need a scale per "
            f"token for keys and values, [pages,page_size] {k_pages.shape[:2]}"
        )


def _first(backend: str, device: Device, call: Callable[[Implementation], Any]) -> Any:
    """Returns the result of the first implementation that takes the input."""
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
    """The implementations to try; on CPU the kernels would only be interpreted."""
    check_backend(backend)
    if backend != AUTO:
        yield backend
    elif device.platform == "cpu":
        yield "reference"
    else:
        yield from device_tiles(device.kind).order
