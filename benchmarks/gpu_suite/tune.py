"""Tiles tried on this GPU: the present one, and those that differ from it in one figure.

The best of every backend and head width are written as a file that can take its place among
`fairkv_jax/pallas/ragged_decode/devices/`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import jax.numpy as jnp

from benchmarks.gpu_suite.bandwidth import DTYPE, lengths_of, lower_walk, queries
from benchmarks.gpu_suite.inputs import CacheShape, Sizes, drawn, page_table
from benchmarks.gpu_suite.programs import compile_all, said, seconds_of
from fairkv_jax.pallas.ragged_decode import Device
from fairkv_jax.pallas.ragged_decode.mosaic import ragged_decode as by_mosaic
from fairkv_jax.pallas.ragged_decode.tiles import (
    DeviceTiles,
    MosaicTile,
    Tile,
    TritonTile,
    device_tiles,
)
from fairkv_jax.pallas.ragged_decode.triton import ragged_decode as by_triton

KERNELS: Mapping[str, tuple[Any, type[Tile]]] = {
    "triton": (by_triton, TritonTile),
    "mosaic": (by_mosaic, MosaicTile),
}


def measure(sizes: Sizes, device: Device) -> Iterator[dict[str, Any]]:
    """One record a (width, backend, tile): the time of a layer of the largest batch."""
    lengths = lengths_of(sizes, max(sizes.batches))["imbalanced"]
    cache = CacheShape.of(lengths)
    itemsize = jnp.dtype(DTYPE).itemsize
    for width in sizes.widths:
        programs = {}
        for backend, (kernel, tile_type) in KERNELS.items():
            try:
                present = device_tiles(device.kind).get(backend, itemsize, width)
            except NotImplementedError:
                continue
            for tile in candidates(tile_type(**present))[: sizes.tiles]:
                attend = partial(kernel, tile=tile, interpret=sizes.interpret)
                programs[backend, tile] = partial(lower_walk, attend, lengths, width, cache)
        pages = cache.pages(width, DTYPE).shape
        pool = drawn(4, pages, DTYPE), drawn(5, pages, DTYPE)
        args = (
            queries(lengths.shape[1], width),
            *pool,
            page_table(2, lengths, cache),
            jnp.asarray(lengths),
        )
        for (backend, tile), program in compile_all(programs).items():
            record = {"width": width, "backend": backend} | asdict(tile)
            yield record | _time(program, args, len(lengths), sizes.repeats)


def candidates(tile: Tile) -> list[Tile]:
    """The tile, one stage fewer and more, and every other figure halved and doubled."""
    found = [tile]
    for field, value in asdict(tile).items():
        stages = field == "num_stages"
        for other in (value - 1, value + 1) if stages else (value // 2, value * 2):
            if other >= 1:
                found.append(replace(tile, **{field: other}))
    return found


def best_tiles(records: list[dict[str, Any]], device: Device, about: str) -> dict[str, Any]:
    """A device's file: what was measured to be best, and what nobody measured as it was."""
    present = device_tiles(device.kind)
    timed = [record for record in records if "layer_us" in record]
    tiles: dict[str, Any] = {
        backend: {size: dict(widths) for size, widths in sizes.items()}
        for backend, sizes in present.tiles.items()
    }
    itemsize = str(jnp.dtype(DTYPE).itemsize)
    for record in sorted(timed, key=lambda record: -record["layer_us"]):
        _, tile_type = KERNELS[record["backend"]]
        tile = {field: record[field] for field in tile_type.__dataclass_fields__}
        tiles[record["backend"]].setdefault(itemsize, {})[str(record["width"])] = tile
    return {
        "match": present.match,
        "source": f"Measured by benchmarks/gpu_suite --parts tune: {about}.",
        "order": [*_by_speed(timed, present), "reference"],
        "tiles": tiles,
    }


def _by_speed(timed: list[dict[str, Any]], present: DeviceTiles) -> list[str]:
    """The kernels, the one first whose best tiles took the least time over all widths."""
    best: dict[str, dict[int, float]] = {}
    for record in timed:
        times = best.setdefault(record["backend"], {})
        width = record["width"]
        times[width] = min(record["layer_us"], times.get(width, record["layer_us"]))
    complete = max(map(len, best.values()), default=0)
    ranked = [name for name in best if len(best[name]) == complete]
    ranked.sort(key=lambda name: sum(best[name].values()))
    return ranked + [name for name in present.order if name not in (*ranked, "reference")]


def _time(program: Any, args: tuple[Any, ...], layers: int, repeats: int) -> dict[str, Any]:
    try:
        if isinstance(program, Exception):
            raise program
        return {"layer_us": 1e6 * seconds_of(program, args, repeats) / layers}
    except Exception as error:  # a tile that does not fit must not end the search
        return {"failed": said(error)}
