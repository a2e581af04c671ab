"""The ragged paged KV pool: its arrays on the devices, and the host's book of its pages.

One pool serves all layers, so what every device must hold is its load over the whole model:

    k_pages, v_pages   [P*pages, page_size, H]     sharded by device
    page_table         [L, B, P*C, max_pages]      page numbers within the slot's own device
    lengths            [L, B, P*C]                 cached tokens; 0 where the slot owns no part
    token_ids          [B, S]                      each row's prompt and output, on all devices
    num_known          [B]                         how many of them are known for sure

Rows stand before slots, as in the queries of a step. Ownership is length: a replica that does not
serve a row has length 0 there. What a step samples is written to `token_ids` and read by the next
one, so that the host need not see it in between; it never overwrites what is known already.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from fairkv_jax.shapes import TENSOR_AXIS


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """The pool on the devices; donated to every step and updated in place."""

    k_pages: Float[Array, "PN page_size H"]
    v_pages: Float[Array, "PN page_size H"]
    page_table: Int[Array, "L B PC max_pages"]
    lengths: Int[Array, "L B PC"]
    token_ids: Int[Array, "B S"]
    num_known: Int[Array, "B"]

    @classmethod
    def partition(cls) -> "KVCache":
        """How each array is split over the mesh."""
        by_slot: Any = PartitionSpec(None, None, TENSOR_AXIS)
        by_page: Any = PartitionSpec(TENSOR_AXIS)
        whole: Any = PartitionSpec()
        return cls(by_page, by_page, by_slot, by_slot, whole, whole)

    @classmethod
    def empty(cls, mesh: Mesh, book: "PageBook", head_dim: int, dtype: str) -> "KVCache":
        """A pool in which no row owns anything."""

        def fill() -> "KVCache":
            pool = (book.num_devices * book.pages_per_device, book.page_size, head_dim)
            return cls(
                jnp.zeros(pool, dtype),
                jnp.zeros(pool, dtype),
                jnp.zeros(book.page_table.shape, jnp.int32),
                jnp.zeros(book.lengths.shape, jnp.int32),
                jnp.zeros((book.lengths.shape[1], book.max_tokens), jnp.int32),
                jnp.zeros(book.lengths.shape[1], jnp.int32),
            )

        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), cls.partition())
        return jax.jit(fill, out_shardings=shardings)()


class PageBook:
    """The host's book of the pool: which page belongs to which (layer, row, slot), which are free.

    It mirrors the devices' page table and lengths, which follow the same rules, so that nothing is
    read back from the devices to know what is full.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_rows: int,
        num_devices: int,
        slots_per_device: int,
        pages_per_device: int,
        page_size: int,
        max_tokens: int,
    ):
        self.num_devices = num_devices
        self.pages_per_device = pages_per_device
        self.page_size = page_size
        self.max_tokens = max_tokens
        num_slots = num_devices * slots_per_device
        max_pages = -(-max_tokens // page_size)
        self.page_table = np.zeros((num_layers, num_rows, num_slots, max_pages), np.int32)
        self.lengths = np.zeros((num_layers, num_rows, num_slots), np.int32)
        self._device_of_slot = np.arange(num_slots) // slots_per_device
        # A stack of free pages a device; the lowest numbers are on top.
        self._free = np.tile(np.arange(pages_per_device, dtype=np.int32)[::-1], (num_devices, 1))
        self._num_free = np.full(num_devices, pages_per_device)

    @property
    def max_pages(self) -> int:
        """Pages of one slot and row at the most."""
        return self.page_table.shape[-1]

    @property
    def free_pages(self) -> np.ndarray:
        """[P] free pages on every device."""
        return self._num_free.copy()

    @property
    def used_pages(self) -> np.ndarray:
        """[P] pages in use on every device."""
        return self.pages_per_device - self._num_free

    @property
    def growth(self) -> np.ndarray:
        """[P] pages that one more token in every owned row opens."""
        return self._opened(1)[1]

    @property
    def load(self) -> np.ndarray:
        """[L, P] cached tokens of every layer on every device."""
        by_slot = self.lengths.sum(1)
        return by_slot.reshape(len(by_slot), self.num_devices, -1).sum(2)

    def pages_for(self, lengths: np.ndarray) -> np.ndarray:
        """[P] pages that slots of these lengths, [..., P*C], take on every device."""
        pages = -(-lengths // self.page_size)
        return pages.reshape(-1, self.num_devices, pages.shape[-1] // self.num_devices).sum((0, 2))

    def insert(self, row: int, lengths: np.ndarray) -> None:
        """Gives an empty row pages for `lengths` [L, P*C]; the caller has seen that there are."""
        layer, slot, page = self._pages(lengths)
        self.page_table[layer, row, slot, page] = self._take(self._device_of_slot[slot])
        self.lengths[:, row] = lengths

    def missing_pages(self, num_tokens: int = 1) -> np.ndarray:
        """[P] pages by which the pool falls short of more tokens in every owned row."""
        return np.maximum(self._opened(num_tokens)[1] - self._num_free, 0)

    def grow(self, num_tokens: int = 1) -> np.ndarray:
        """Adds tokens, at most a page of them, to every owned row.

        Returns the new pages [L, B, P*C], -1 where none is needed.
        """
        opened, _ = self._opened(num_tokens)
        new_pages = np.full(self.lengths.shape, -1, np.int32)
        layer, row, slot = np.nonzero(opened)
        pages = self._take(self._device_of_slot[slot])
        new_pages[layer, row, slot] = pages
        at = -(-self.lengths[layer, row, slot] // self.page_size)
        self.page_table[layer, row, slot, at] = pages
        self.lengths += num_tokens * (self.lengths > 0)
        return new_pages

    def release(self, row: int) -> None:
        """Frees all pages of a row."""
        layer, slot, page = self._pages(self.lengths[:, row])
        devices = self._device_of_slot[slot]
        freed = self.page_table[layer, row, slot, page]
        for device in range(self.num_devices):
            mine = freed[devices == device]
            start = self._num_free[device]
            self._free[device, start : start + len(mine)] = mine
            self._num_free[device] += len(mine)
        self.lengths[:, row] = 0

    def _pages(self, lengths: np.ndarray) -> tuple[np.ndarray, ...]:
        """(layer, slot, place in the row's table) of every page of a row's `lengths` [L, P*C]."""
        pages = -(-lengths // self.page_size)
        return np.nonzero(np.arange(self.max_pages) < pages[..., None])

    def _opened(self, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Where more tokens open a page, [L, B, P*C], and how many pages on every device, [P]."""
        full = -self.lengths % self.page_size < num_tokens
        opened = (self.lengths > 0) & full
        by_slot = opened.sum((0, 1))
        return opened, by_slot.reshape(self.num_devices, -1).sum(1)

    def _take(self, devices: np.ndarray) -> np.ndarray:
        """Takes a free page on each of the given devices."""
        taken = np.empty(len(devices), np.int32)
        for device in range(self.num_devices):
            mine = devices == device
            count = int(mine.sum())
            left = self._num_free[device] - count
            if left < 0:
                raise RuntimeError(
                    f"device {device} has {self._num_free[device]} free pages, {count} are needed"
                )
            taken[mine] = self._free[device, left : left + count][::-1]
            self._num_free[device] = left
        return taken
