"""Which pages of the KV cache are free, and how often the others are in use."""

import numpy as np


class PagePool:
    """The pages of every device with their reference counts; a page is free at count 0."""

    def __init__(self, num_devices: int, pages_per_device: int):
        self.references = np.zeros((num_devices, pages_per_device), np.int32)
        # A stack of free pages per device; the lowest numbers are on top.
        self._free = np.tile(np.arange(pages_per_device, dtype=np.int32)[::-1], (num_devices, 1))
        self._num_free = np.full(num_devices, pages_per_device)

    @property
    def num_free(self) -> np.ndarray:
        """[P] free pages on every device."""
        return self._num_free.copy()

    def take(self, devices: np.ndarray) -> np.ndarray:
        """Takes a free page on each of the given devices, with one reference.

        Raises:
            RuntimeError: a device has too few free pages; the caller has not looked.
        """
        needed = np.bincount(devices, minlength=len(self._num_free))
        if (needed > self._num_free).any():
            device = int(np.argmax(needed > self._num_free))
            raise RuntimeError(
                f"device {device} has {self._num_free[device]} free pages, "
                f"{needed[device]} are needed"
            )
        taken = np.empty(len(devices), np.int32)
        for device in np.flatnonzero(needed):
            left = self._num_free[device] - needed[device]
            taken[devices == device] = self._free[device, left : self._num_free[device]][::-1]
            self._num_free[device] = left
        self.references[devices, taken] = 1
        return taken

    def retain(self, devices: np.ndarray, pages: np.ndarray) -> None:
        """Adds a reference to each page; they are in use already."""
        np.add.at(self.references, (devices, pages), 1)

    def release(self, devices: np.ndarray, pages: np.ndarray) -> None:
        """Takes a reference from each page; those that have none left are free."""
        np.subtract.at(self.references, (devices, pages), 1)
        is_free = self.references[devices, pages] == 0
        for device in range(len(self._num_free)):
            freed = np.unique(pages[is_free & (devices == device)])
            start = self._num_free[device]
            self._free[device, start : start + len(freed)] = freed
            self._num_free[device] += len(freed)
