"""Tile sizes as data: one JSON file per kind of device, in the folder `devices/` beside this.

A file names the kinds that it is for (`match`, see `is_kind`), the order in which implementations
are tried there, and one tile per item size and head dimension. `source` says whether the figures
were measured or estimated.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

_DEFAULT = "default"


@dataclass(frozen=True)
class Device:
    """The platform and kind of a device, as JAX names them."""

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
    """Pieces that the work is cut into, plus at most one per pair: several times the number of
    programs that the device runs at once, so that little of it is idle at the end."""
    min_blocks: int
    """The fewest blocks of a piece, so that short work is not cut too finely."""


@dataclass(frozen=True)
class TritonTile(Tile):
    """The tile of the Triton kernel, whose blocks are a power of 2, at least 16."""

    num_warps: int


@dataclass(frozen=True)
class MosaicTile(Tile):
    """The tile of the Mosaic GPU kernel, whose blocks are a multiple of the 64 rows of wgmma."""


@dataclass(frozen=True)
class DeviceTiles:
    """The contents of one file."""

    match: str
    order: tuple[str, ...]
    source: str
    tiles: Mapping[str, Mapping[str, Mapping[str, int]]]

    def get(self, backend: str, itemsize: int, head_dim: int) -> Mapping[str, int]:
        """The tile of a backend for items of `itemsize` bytes and the next listed head dimension.

        Raises:
            NotImplementedError: None is listed.
        """
        listed = self.tiles.get(backend, {}).get(str(itemsize), {})
        fits: list[int] = [int(at) for at in listed if int(at) >= head_dim]
        if not fits:
            raise NotImplementedError(
                f"no {backend} tile for items of {itemsize} bytes, head_dim {head_dim}"
            )
        entry: Any = listed[str(min(fits))]
        return entry


def is_kind(name: str, kind: str) -> bool:
    """Whether JAX's `device_kind` contains that name, not followed by a digit.

    So "L40" also names an "NVIDIA L40S", but "L4" does not.
    """
    return re.search(rf"{re.escape(name)}(?!\d)", kind) is not None


def device_tiles(kind: str) -> DeviceTiles:
    """The tiles of that kind of device, or the default ones where no file names it."""
    files = _files()
    name = next((name for name, tiles in files.items() if is_kind(tiles.match, kind)), _DEFAULT)
    return files[name]


@cache
def _files() -> dict[str, DeviceTiles]:
    """All files by name; the default matches no kind."""
    folder = resources.files("fairkv_jax.pallas.ragged_decode") / "devices"
    files = {}
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        if path.name.endswith(".json"):
            record = json.loads(path.read_text())
            record["order"] = tuple(record["order"])
            files[path.name.removesuffix(".json")] = DeviceTiles(**record)
    return files
