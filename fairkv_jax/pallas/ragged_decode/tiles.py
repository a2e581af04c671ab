"""Tile sizes as data: one JSON file per kind of device, in the folder `devices/` beside this.

A file names the kinds that it is for (`match`, found in JAX's `device_kind`), the order in which
implementations are tried there, and one tile per item size and head width. `source` says whether
the figures were measured or reckoned.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

_DEFAULT = "default"


@dataclass(frozen=True)
class Device:
    """What dispatch needs to know of a device, as JAX names it."""

    platform: str
    """"cpu" or "gpu"."""
    kind: str


@dataclass(frozen=True)
class Tile:
    """How a GPU kernel cuts its work."""

    block_tokens: int
    """Cached tokens that a program multiplies at once."""
    num_stages: int
    """Blocks in flight: the depth of the pipeline."""
    programs: int
    """Pieces that the work is cut into, beside one more per pair: a few for every one of the
    programs that the device holds at a time, so that the last ones to end leave little idle."""
    min_blocks: int
    """The least blocks a piece, so that short work is not cut into shreds."""


@dataclass(frozen=True)
class TritonTile(Tile):
    """Of the Triton-style kernel: blocks of a power of 2, at least 16."""

    num_warps: int


@dataclass(frozen=True)
class MosaicTile(Tile):
    """Of the Mosaic GPU kernel: blocks of a multiple of 64, the rows of Hopper's wgmma."""


@dataclass(frozen=True)
class DeviceTiles:
    """One file's contents."""

    match: str
    order: tuple[str, ...]
    source: str
    tiles: Mapping[str, Mapping[str, Mapping[str, int]]]

    def get(self, backend: str, itemsize: int, width: int) -> Mapping[str, int]:
        """The tile of a backend for items of `itemsize` bytes and the next width that is listed.

        Raises:
            NotImplementedError: none is listed.
        """
        listed = self.tiles.get(backend, {}).get(str(itemsize), {})
        fits: list[int] = [int(at) for at in listed if int(at) >= width]
        if not fits:
            raise NotImplementedError(
                f"no {backend} tile for items of {itemsize} bytes, head width {width}"
            )
        entry: Any = listed[str(min(fits))]
        return entry


def device_tiles(kind: str) -> DeviceTiles:
    """The tiles of that kind of device, or those for devices that nobody has listed."""
    files = _files()
    name = next((name for name, tiles in files.items() if tiles.match in kind), _DEFAULT)
    return files[name]


@cache
def _files() -> dict[str, DeviceTiles]:
    """All files; the default matches no kind by its name."""
    folder = resources.files("fairkv_jax.pallas.ragged_decode") / "devices"
    files = {}
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        if path.name.endswith(".json"):
            record = json.loads(path.read_text())
            record["order"] = tuple(record["order"])
            files[path.name.removesuffix(".json")] = DeviceTiles(**record)
    return files
