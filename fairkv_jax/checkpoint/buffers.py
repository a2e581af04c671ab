"""Memory that is used again for what is read next: fresh pages cost as much as reading does."""

import math

import numpy as np


class Buffers:
    """Hands out arrays in memory that nobody looks at any more; several threads may ask."""

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = {}

    def array(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array of any content, whose memory comes back with the last view of it."""
        num_bytes = math.prod(shape) * dtype.itemsize
        free = self._free.setdefault(num_bytes, [])
        try:
            memory = free.pop()
        except IndexError:
            memory = np.empty(num_bytes, np.uint8)
        return np.asarray(_Lease(memory, free)).view(dtype).reshape(shape)


class _Lease:
    """What all views of an array hold on to; NumPy takes it for an array by its interface."""

    def __init__(self, memory: np.ndarray, free: list[np.ndarray]) -> None:
        self.__array_interface__ = memory.__array_interface__
        self._memory, self._free = memory, free

    def __del__(self) -> None:
        self._free.append(self._memory)
