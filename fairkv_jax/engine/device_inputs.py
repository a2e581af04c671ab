"""Turns what the scheduler says into arrays on the devices."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fairkv_jax.cache import REPLICATED_AT_ONCE, TableWrites
from fairkv_jax.decode import IDLE_ROW, DecodeInputs
from fairkv_jax.engine.page_tables import PageCopies, PageReplication, PageTableUpdate
from fairkv_jax.engine.scheduler_output import Decode, NewRequest
from fairkv_jax.kv_cache_spec import KVCacheSpec
from fairkv_jax.sampling import SamplingState
from fairkv_jax.sampling_params import SamplingParams, num_bitmask_words
from fairkv_jax.sharding.mesh import put_own_shards


class DeviceInputs:
    """Makes the inputs of the compiled steps; what does not change stays on the devices."""

    def __init__(
        self,
        mesh: Mesh,
        spec: KVCacheSpec,
        vocab_size: int,
        eos_token_ids: Iterable[int],
        max_table_writes: int,
    ):
        """`max_table_writes` is the number of page-table entries that a step takes per device."""
        self._mesh, self._spec, self._vocab_size = mesh, spec, vocab_size
        self._eos_token_ids = tuple(eos_token_ids)
        self._max_table_writes = max_table_writes
        self._put = put_own_shards if mesh.is_multi_process else jax.device_put
        self._sampling: SamplingState | None = None
        """The rows' options on the devices; None when the rows have changed."""
        self._no_bitmasks: dict[int, jax.Array] = {}
        """By batch: stands for the bitmasks of rows without a grammar."""
        self._no_writes: TableWrites | None = None

    def rows_have_changed(self) -> None:
        """Forgets the options of the rows."""
        self._sampling = None

    def decode(
        self, decode: Decode, requests: Mapping[int, NewRequest], batch: int
    ) -> DecodeInputs:
        """The inputs of a decode step over the first `batch` rows; `requests` are by row."""
        positions, output_index = np.zeros((2, batch), np.int32)
        for each in decode.rows:
            positions[each.row] = each.position
            output_index[each.row] = each.output_index
        positions, output_index = self._on_all_devices((positions, output_index))
        bitmasks = self._bitmasks(batch, decode.grammar_bitmasks)
        return DecodeInputs(positions, output_index, self._sampling_of(requests, batch), bitmasks)

    def sampling(self, options: list[tuple[SamplingParams, int]]) -> SamplingState:
        """Options and seeds, one pair per row, as arrays."""
        return SamplingState.stack(options, self._vocab_size, self._eos_token_ids)

    def _sampling_of(self, requests: Mapping[int, NewRequest], batch: int) -> SamplingState:
        """The options of the first rows, on all devices."""
        sampling = self._sampling
        if sampling is None or len(sampling.temperature) != batch:
            options = [
                (request.sampling_params, request.seed) if request is not None else IDLE_ROW
                for request in map(requests.get, range(batch))
            ]
            sampling = self._sampling = self._on_all_devices(self.sampling(options))
        return sampling

    def _bitmasks(self, batch: int, bitmasks: dict[int, np.ndarray]) -> jax.Array:
        """The bitmasks of a batch, on all devices."""
        shape = (batch, num_bitmask_words(self._vocab_size))
        if not bitmasks:
            if batch not in self._no_bitmasks:
                self._no_bitmasks[batch] = self._on_all_devices(np.zeros(shape, np.uint32))
            return self._no_bitmasks[batch]
        words = np.zeros(shape, np.uint32)
        for row, bitmask in bitmasks.items():
            words[row] = bitmask
        return self._on_all_devices(words)

    def table_writes(self, update: PageTableUpdate) -> Iterator[TableWrites]:
        """The changes of the page tables, in parts that a program takes."""
        spec, size = self._spec, self._max_table_writes
        entry_device, entry = np.divmod(update.entry_index, spec.table_entries)
        row, slot = np.divmod(update.start_index, spec.num_slots)
        start_device, slot = np.divmod(slot, spec.slots_per_device)
        start = row * spec.slots_per_device + slot
        most = max(
            np.bincount(device, minlength=1).max() for device in (entry_device, start_device)
        )
        shape = (-(-most // size), spec.num_devices, size)
        pairs = spec.num_layers * spec.num_rows * spec.slots_per_device
        entries = _split(entry_device, entry, update.entry_value, shape, spec.table_entries)
        starts = _split(start_device, start, update.start_value, shape, pairs)
        for part in zip(*entries, *starts, strict=True):
            arrays: Any = part
            yield TableWrites(*arrays)

    def page_copies(self, copies: PageCopies) -> tuple[np.ndarray, np.ndarray]:
        """The pages to be copied from and to on every device, as `copy_pages` takes them."""
        spec = self._spec
        shape = (1, spec.num_devices, spec.num_layers * spec.slots_per_device)
        target, source = _split(
            copies.devices, copies.target, copies.source, shape, spec.pages_per_device
        )
        return source[0], target[0]

    def page_replications(
        self, replication: PageReplication
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The pages to be sent and received by every device, as `replicate_pages` takes them."""
        spec, size = self._spec, REPLICATED_AT_ONCE
        for start in range(0, len(replication.source), size):
            part = slice(start, start + size)
            sides = []
            for devices, pages in (
                (replication.source_devices[part], replication.source[part]),
                (replication.target_devices[part], replication.target[part]),
            ):
                side = np.full((spec.num_devices, size), spec.pages_per_device, np.int32)
                side[devices, np.arange(len(devices))] = pages
                sides.append(side)
            yield sides[0], sides[1]

    def no_writes(self) -> TableWrites:
        """No changes, on the devices already: most steps open no page."""
        writes = self._no_writes
        if writes is None:
            size = (self._spec.num_devices, self._max_table_writes)
            none: Any = np.full(size, np.iinfo(np.int32).max, np.int32)
            shardings = jax.tree.map(
                lambda part: NamedSharding(self._mesh, part), TableWrites.partition()
            )
            writes = TableWrites(none, none, none, none)
            writes = self._no_writes = self._put(writes, shardings)
        return writes

    def _on_all_devices(self, arrays: Any) -> Any:
        """Copies a pytree of arrays to every device."""
        return self._put(arrays, NamedSharding(self._mesh, PartitionSpec()))


def _split(
    devices: np.ndarray,
    indices: np.ndarray,
    values: np.ndarray,
    shape: tuple[int, int, int],
    unused: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Changes, sorted by device, in parts [parts, P, n] of indices and of values."""
    order = np.argsort(devices, kind="stable")
    devices = devices[order]
    counts = np.bincount(devices, minlength=shape[1])
    part, column = np.divmod(
        np.arange(len(devices)) - np.repeat(np.cumsum(counts) - counts, counts), shape[2]
    )
    split_indices = np.full(shape, unused, np.int32)
    split_values = np.zeros(shape, np.int32)
    split_indices[part, devices, column] = indices[order]
    split_values[part, devices, column] = values[order]
    return split_indices, split_values
