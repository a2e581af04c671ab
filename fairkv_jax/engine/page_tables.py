"""The host's page tables: a flat list of page numbers per device, in segments that can move.

Every (layer, row, slot) that owns tokens has a segment of its device's list:

    starts    [L, B, P*C]   where the segment begins
    entries   [P, E]        [ page page page .. | page page .... | page .. | free ......... ]
                              segment of a pair   of another

A segment has a few spare entries. When it is full it moves to a larger one: to a free segment of
that size, else to the end of the list. When the end is reached, the live segments are moved
together. The size of the list therefore follows from the pages that there are, and from how many
rows may share them, whatever the longest request may be. Changes are collected, so that only what
has changed is sent to the devices.
"""

from dataclasses import dataclass

import numpy as np

from fairkv_jax.kv_cache_spec import SPARE_ENTRIES, KVCacheSpec


@dataclass(frozen=True)
class PageTableUpdate:
    """Entries of the page tables to be overwritten; every index occurs once."""

    entry_index: np.ndarray
    """[n] indices into the devices' lists, concatenated: device * E + index."""
    entry_value: np.ndarray
    """[n] page numbers within the device."""
    start_index: np.ndarray
    """[m] indices into the flattened [L, B, P*C]."""
    start_value: np.ndarray
    """[m] indices into the device's list."""

    @property
    def num_entries(self) -> int:
        return len(self.entry_index)

    def __bool__(self) -> bool:
        return bool(len(self.entry_index) or len(self.start_index))


@dataclass(frozen=True)
class PageCopies:
    """Pages to be copied, each on its own device."""

    devices: np.ndarray
    """[n] the device of every copy."""
    source: np.ndarray
    """[n] page numbers within the device."""
    target: np.ndarray


@dataclass(frozen=True)
class PageReplication:
    """Pages to be copied from one device to another."""

    source_devices: np.ndarray
    """[n] the device that holds each page."""
    source: np.ndarray
    """[n] page numbers within that device."""
    target_devices: np.ndarray
    target: np.ndarray


class PageTables:
    """Segments of page numbers for (layer, row, slot) pairs; it takes and frees no pages itself."""

    def __init__(self, spec: KVCacheSpec):
        self._spec = spec
        shape = (spec.num_layers, spec.num_rows, spec.num_slots)
        self.starts = np.zeros(shape, np.int32)
        self.counts = np.zeros(shape, np.int32)
        """Pages of every pair."""
        self.entries = np.zeros((spec.num_devices, spec.table_entries), np.int32)
        self._capacity = np.zeros(shape, np.int32)
        self._end = np.zeros(spec.num_devices, np.int64)
        self._free: list[dict[int, list[int]]] = [{} for _ in range(spec.num_devices)]
        """Starts of each device's free segments, by their capacity."""
        self._changed_entries: list[np.ndarray] = []
        self._compacted: set[int] = set()
        """Devices whose lists have changed as a whole."""
        self._changed_starts: list[np.ndarray] = []

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays."""
        arrays = (self.starts, self.counts, self.entries, self._capacity)
        return sum(array.nbytes for array in arrays)

    def pages(self, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The devices and page numbers of all pages of some pairs, in the pairs' order.

        `pairs` are indices into the flattened [L, B, P*C].
        """
        counts = self.counts.flat[pairs]
        devices = np.repeat(self._device(pairs), counts)
        return devices, self.entries[devices, _ranges(self.starts.flat[pairs], counts)]

    def append(self, pairs: np.ndarray, counts: np.ndarray, pages: np.ndarray) -> None:
        """Appends `counts[i]` pages to `pairs[i]`; `pages` holds them one pair after another."""
        old = self.counts.flat[pairs]
        is_full = old + counts > self._capacity.flat[pairs]
        if is_full.any():
            self._move(pairs[is_full], (old + counts)[is_full])
        devices = np.repeat(self._device(pairs), counts)
        indices = _ranges(self.starts.flat[pairs] + old, counts)
        self._write(devices, indices, pages)
        self.counts.flat[pairs] = old + counts

    def truncate(self, pairs: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Forgets the pages of `pairs[i]` after the first `counts[i]`.

        Returns their devices and page numbers. The devices need not be told, since readers know how
        many tokens there are.
        """
        dropped = self.counts.flat[pairs] - counts
        devices = np.repeat(self._device(pairs), dropped)
        pages = self.entries[devices, _ranges(self.starts.flat[pairs] + counts, dropped)]
        self.counts.flat[pairs] = counts
        return devices, pages

    def clear(self, pairs: np.ndarray) -> None:
        """Forgets all pages of some pairs."""
        self._free_segments(pairs)
        self.counts.flat[pairs] = 0
        self._capacity.flat[pairs] = 0

    def take_update(self) -> PageTableUpdate:
        """What has changed since the last call."""
        size, compacted = self._spec.table_entries, self._compacted
        index = np.unique(np.concatenate(self._changed_entries or [_NONE]))
        if compacted:
            whole = [device * size + np.arange(self._end[device]) for device in compacted]
            index = np.concatenate([index[~np.isin(index // size, list(compacted))], *whole])
        moved = np.unique(np.concatenate(self._changed_starts or [_NONE]))
        self._changed_entries, self._changed_starts, self._compacted = [], [], set()
        return PageTableUpdate(
            index, self.entries.reshape(-1)[index], moved, self.starts.flat[moved]
        )

    def _device(self, pairs: np.ndarray) -> np.ndarray:
        return pairs % self._spec.num_slots // self._spec.slots_per_device

    def _move(self, pairs: np.ndarray, sizes: np.ndarray) -> None:
        """Gives pairs new segments of at least `sizes` entries."""
        devices = self._device(pairs)
        for device in np.unique(devices).tolist():
            mine = pairs[devices == device]
            capacity = _capacity_for(sizes[devices == device])
            starts = self._find_segments(device, capacity)
            if starts is None:
                self._compact(device)
                starts = self._take_from_end(device, capacity)
            self._free_segments(mine)
            self._move_to(device, mine, starts, capacity)

    def _find_segments(self, device: int, capacity: np.ndarray) -> np.ndarray | None:
        """Free segments of these capacities; None where the list is too short."""
        starts = np.full(len(capacity), -1, np.int64)
        for size in np.unique(capacity).tolist():
            free = self._free[device].get(size, [])
            wanted = np.flatnonzero(capacity == size)[: len(free)]
            if len(wanted):
                starts[wanted] = free[len(free) - len(wanted) :]
                del free[len(free) - len(wanted) :]
        rest = starts < 0
        if self._end[device] + capacity[rest].sum() > self._spec.table_entries:
            return None
        starts[rest] = self._take_from_end(device, capacity[rest])
        return starts

    def _take_from_end(self, device: int, capacity: np.ndarray) -> np.ndarray:
        starts = self._end[device] + np.cumsum(capacity) - capacity
        self._end[device] += capacity.sum()
        assert self._end[device] <= self._spec.table_entries, "more pages than can be listed"
        return starts

    def _free_segments(self, pairs: np.ndarray) -> None:
        """Notes that the segments of pairs are free."""
        capacity, devices = self._capacity.flat[pairs], self._device(pairs)
        order = np.lexsort((capacity, devices))
        keys = np.stack([devices[order], capacity[order]])
        edges = np.flatnonzero(np.any(keys[:, 1:] != keys[:, :-1], axis=0)) + 1
        for part in np.split(order, edges):
            if len(part) and capacity[part[0]]:
                free = self._free[int(devices[part[0]])].setdefault(int(capacity[part[0]]), [])
                free.extend(self.starts.flat[pairs[part]].tolist())

    def _compact(self, device: int) -> None:
        """Moves the segments of a device together, to the front of its list."""
        pairs = np.flatnonzero(self.counts)
        pairs = pairs[self._device(pairs) == device]
        capacity = _capacity_for(self.counts.flat[pairs])
        self._end[device] = 0
        self._free[device] = {}
        self._compacted.add(device)
        self._move_to(device, pairs, self._take_from_end(device, capacity), capacity)

    def _move_to(
        self, device: int, pairs: np.ndarray, starts: np.ndarray, capacity: np.ndarray
    ) -> None:
        """Copies the pages of pairs into other segments."""
        counts = self.counts.flat[pairs]
        pages = self.entries[device, _ranges(self.starts.flat[pairs], counts)]
        self.starts.flat[pairs] = starts
        self._capacity.flat[pairs] = capacity
        self._write(np.full(len(pages), device), _ranges(starts, counts), pages)
        self._changed_starts.append(pairs)

    def _write(self, devices: np.ndarray, indices: np.ndarray, pages: np.ndarray) -> None:
        self.entries[devices, indices] = pages
        index = devices.astype(np.int64) * self._spec.table_entries + indices
        if self._compacted:  # their lists are sent as a whole
            index = index[~np.isin(devices, list(self._compacted))]
        self._changed_entries.append(index)


_NONE = np.zeros(0, np.int64)
_CAPACITY_STEP = 8
"""Few different capacities let free segments be used again."""
_LEAST_SPARE_ENTRIES = SPARE_ENTRIES - _CAPACITY_STEP


def _capacity_for(counts: np.ndarray) -> np.ndarray:
    """Entries of a segment: a quarter or 4 more than it needs, rounded up to a multiple of 8."""
    spare = np.maximum(_LEAST_SPARE_ENTRIES, counts // 4)
    return -(-(counts + spare) // _CAPACITY_STEP) * _CAPACITY_STEP


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """[starts[0], starts[0] + 1, .. starts[1], ..]: `counts[i]` consecutive numbers from each."""
    offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(starts.astype(np.int64), counts) + offsets
