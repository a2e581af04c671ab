"""Files of checkpoints: memory maps, JSON objects, and memory that is used again."""

import json
import math
import mmap
from pathlib import Path
from typing import Any

import numpy as np

from fairkv_jax.checkpoint.base import CheckpointError

RESIDENT_BYTES = 256 << 20
"""Bytes that a map hands out before it releases the pages that were read."""


class MappedFile:
    """A file mapped into memory, of which at most about `RESIDENT_BYTES` stay resident.

    Views stay valid: a released page is read again from the system's page cache.

    Raises:
        CheckpointError: the file is missing, empty or cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with path.open("rb") as file:
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise CheckpointError(f"cannot read the checkpoint {path}: {error}") from error
        self._handed_out = 0

    def view(self, offset: int, num_bytes: int) -> np.ndarray:
        """Read-only bytes; the caller has checked that they lie within the file as it was opened.

        Raises:
            CheckpointError: the file has been truncated since. Reading the missing part of the map
                would end the process (SIGBUS).
        """
        size = self.data.size()  # of the file, not of the map
        if offset + num_bytes > size:
            raise CheckpointError(
                f"{self._path} has been truncated to {size} bytes while it was read: copy or fetch "
                "it again, and do not write to it meanwhile"
            )
        self._handed_out += num_bytes
        if self._handed_out > RESIDENT_BYTES:
            self.data.madvise(mmap.MADV_DONTNEED)
            self._handed_out = num_bytes
        start = offset // mmap.PAGESIZE * mmap.PAGESIZE
        self.data.madvise(mmap.MADV_WILLNEED, start, offset + num_bytes - start)
        return np.frombuffer(self.data, np.uint8, num_bytes, offset)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: the file cannot be read or holds something else.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    return parse_object(content, path)


def parse_object(content: bytes, path: Path) -> dict[str, Any]:
    """The JSON object in these bytes, which come from `path`; raises as `read_object`."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: it holds no JSON object")
    return value


class Buffers:
    """Hands out arrays whose memory is used again once nothing refers to it.

    Touching fresh pages costs as much time as reading the data. Several threads may ask at once.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = {}

    def array(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An uninitialised array; its memory returns when the last view of it is deleted."""
        num_bytes = math.prod(shape) * dtype.itemsize
        free = self._free.setdefault(num_bytes, [])
        try:
            memory = free.pop()
        except IndexError:
            memory = np.empty(num_bytes, np.uint8)
        return np.asarray(_Lease(memory, free)).view(dtype).reshape(shape)


class _Lease:
    """The base object of all views of an array; NumPy reads it through its array interface."""

    def __init__(self, memory: np.ndarray, free: list[np.ndarray]) -> None:
        self.__array_interface__ = memory.__array_interface__
        self._memory, self._free = memory, free

    def __del__(self) -> None:
        self._free.append(self._memory)
