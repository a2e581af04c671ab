"""A checkpoint's file, mapped into memory, of which little stays resident."""

import mmap
from pathlib import Path

import numpy as np

from fairkv_jax.checkpoint.base import CheckpointError

RESIDENT_BYTES = 256 << 20
"""Bytes handed out before the pages that were touched are given back."""


class MappedFile:
    """Bytes of a file that cost memory only where they are read, and only for a while.

    Views stay valid for good: a page that was given back comes from the system's cache again.

    Raises:
        CheckpointError: the file is missing, empty or cannot be read.
    """

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise CheckpointError(f"cannot read the checkpoint {path}: {error}") from error
        self._handed_out = 0

    def view(self, offset: int, num_bytes: int) -> np.ndarray:
        """Read-only bytes, which the caller knows to lie within the file."""
        self._handed_out += num_bytes
        if self._handed_out > RESIDENT_BYTES:
            self.data.madvise(mmap.MADV_DONTNEED)
            self._handed_out = num_bytes
        start = offset // mmap.PAGESIZE * mmap.PAGESIZE
        self.data.madvise(mmap.MADV_WILLNEED, start, offset + num_bytes - start)
        return np.frombuffer(self.data, np.uint8, num_bytes, offset)
