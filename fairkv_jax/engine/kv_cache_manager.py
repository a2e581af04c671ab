"""The host's account of the KV cache: pages, page tables, and which replica serves which row.

It mirrors the devices' page tables and lengths, which follow the same rules, so that nothing is
read back to know what is full. The scheduler asks it before it schedules:

    reserve_prompt   routes a row's heads to replicas and takes pages for its kept prompt
    reserve_suffix   takes pages for the kept tokens of a suffix, after those of its row
    activate         lets a row take part in decoding
    reserve          takes pages for the next tokens of every active row
    commit           counts tokens that the devices have written
    shrink           gives back the pages that a row has no more use for
    free             gives a row's pages back
    retain           keeps the pages of a row as a prefix, whatever happens to the row
    share            begins a row with the pages of a prefix
    routed           selects the places of a prefix that has been replicated
    replicate        takes pages for copies of a prefix's heads on other devices
"""

from collections.abc import Sequence

import numpy as np

from fairkv_jax.engine.page_pool import PagePool
from fairkv_jax.engine.page_tables import (
    PageCopies,
    PageReplication,
    PageTables,
    PageTableUpdate,
)
from fairkv_jax.engine.prefix_pages import PrefixPages
from fairkv_jax.kv_cache_spec import KVCacheSpec
from fairkv_jax.plan import route, route_beyond
from fairkv_jax.sharding.slots import SlotLayout


class KVCacheManager:
    """Decides which pages hold the tokens of each (layer, row, slot)."""

    def __init__(self, spec: KVCacheSpec, layout: SlotLayout):
        self.spec = spec
        self._layout = layout
        self._pool = PagePool(spec.num_devices, spec.pages_per_device)
        self._tables = PageTables(spec)
        # Tokens that fit into the last page of every (layer, row, slot), [L, B, P*C].
        self._room = np.full((spec.num_layers, spec.num_rows, spec.num_slots), _NOT_OWNED)
        self._is_active = np.zeros(spec.num_rows, bool)
        self._num_listed = np.zeros(spec.num_devices, np.int64)
        """[P] pages of all rows; those that rows share count for each of them."""
        self._uncommitted = np.zeros(spec.num_rows, np.int64)

    @property
    def lengths(self) -> np.ndarray:
        """[L, B, P*C] tokens for which there are pages; 0 where a slot owns no part of a row."""
        counts = self._tables.counts
        return np.where(counts > 0, counts * self.spec.page_size - self._room, 0)

    @property
    def committed_lengths(self) -> np.ndarray:
        """[L, B, P*C] tokens that the devices have written."""
        lengths = self.lengths
        return lengths - (lengths > 0) * self._uncommitted[:, None]

    @property
    def used_pages(self) -> np.ndarray:
        """[P] pages in use on every device."""
        return self.spec.pages_per_device - self._pool.num_free

    @property
    def tokens_per_device(self) -> np.ndarray:
        """[L, P] cached tokens of every layer on every device."""
        by_slot = self.lengths.sum(1)
        return by_slot.reshape(len(by_slot), self.spec.num_devices, -1).sum(2)

    @property
    def num_table_bytes(self) -> int:
        """Bytes of the page tables on the host."""
        return self._tables.num_bytes + self._room.nbytes

    def pages_of(self, layer: int, row: int, slot: int) -> np.ndarray:
        """The page numbers, within the slot's device, that hold a slot's part of a row."""
        pair = np.ravel_multi_index((layer, row, slot), self._room.shape)
        return self._tables.pages(np.array([pair]))[1]

    def reserve_prompt(
        self, row: int, head_lengths: np.ndarray, num_known_tokens: int = 0
    ) -> np.ndarray | None:
        """Takes pages of an empty row for what is kept of a prompt, [L, K] tokens.

        Each head is routed to the replica on the device that holds the fewest tokens. The row is
        given pages only if there are enough also for the `num_known_tokens` that will be appended
        to it in any case, for one more, and for one more token in every active row.

        Returns:
            The tokens of every slot, [L, P*C], 0 where the slot does not serve the row; None where
            the pages do not suffice.
        """
        owner = route(self._layout.replicas, head_lengths, self.tokens_per_device)
        lengths = self._slot_lengths(owner, head_lengths)
        self._room[:, row] = np.where(lengths > 0, 0, _NOT_OWNED)
        if not self._extend(row, lengths, num_known_tokens):
            self._room[:, row] = _NOT_OWNED
            return None
        return lengths

    def reserve_suffix(
        self, row: int, head_lengths: np.ndarray, num_known_tokens: int = 0
    ) -> np.ndarray | None:
        """Takes pages for the kept tokens of a suffix, [L, K], after the tokens of its row.

        Each head's tokens go to the slot that owns the row already. The other pages that there
        must be are those of `reserve_prompt`.

        Returns:
            The tokens of every slot of the row afterwards, [L, P*C]; None where the pages do not
            suffice.
        """
        lengths = self.lengths[:, row]
        of_slots = np.take_along_axis(head_lengths, np.maximum(self._layout.head_of_slot, 0), 1)
        added = np.where(lengths > 0, of_slots, 0)
        if not self._extend(row, added, num_known_tokens):
            return None
        return (lengths + added).astype(np.int32)

    def activate(self, row: int) -> None:
        """Lets a row, all of whose prompt has pages, take part in decoding."""
        self._is_active[row] = True

    def can_reserve(self, num_tokens: int) -> bool:
        """Whether there are pages for at most a page of further tokens in every active row."""
        return self._has_room(self._num_opened(num_tokens))

    def reserve(self, num_tokens: int) -> bool:
        """Takes pages for at most a page of further tokens in every active row.

        All of them get their pages, or none; False if too few are free.
        """
        if not self.can_reserve(num_tokens):
            return False
        pairs = np.flatnonzero(self._opens_page(num_tokens))
        self._room[:, self._is_active] -= num_tokens
        self._room.flat[pairs] += self.spec.page_size
        self._uncommitted[self._is_active] += num_tokens
        self._append_new_pages(pairs, np.ones(len(pairs), np.int64))
        return True

    def commit(self, row: int, num_tokens: int) -> None:
        """Counts reserved tokens of a row that the devices have written."""
        self._uncommitted[row] -= num_tokens

    def shrink(self, row: int, head_lengths: np.ndarray) -> None:
        """Gives back the pages that a row does not need since the devices have compressed it.

        `head_lengths` [L, K] are its tokens before those that are not committed yet.
        """
        before, size = self.lengths[:, row], self.spec.page_size
        of_slots = np.take_along_axis(head_lengths, np.maximum(self._layout.head_of_slot, 0), 1)
        lengths = np.where(before > 0, of_slots + self._uncommitted[row], 0)
        assert (lengths <= before).all(), "compression has added tokens"
        counts = _num_pages(lengths, size)
        layer, slot = np.nonzero(before)
        pairs = np.ravel_multi_index((layer, row, slot), self._room.shape)
        devices, pages = self._tables.truncate(pairs, counts[layer, slot])
        self._pool.release(devices, pages)
        self._num_listed -= np.bincount(devices, minlength=self.spec.num_devices)
        self._room[layer, row, slot] = (counts * size - lengths)[layer, slot]

    def free(self, row: int) -> None:
        """Gives back all pages of a row; those that prefixes or other rows hold remain in use."""
        pairs = self._pairs(row)
        devices, pages = self._tables.pages(pairs)
        self._pool.release(devices, pages)
        self._num_listed -= np.bincount(devices, minlength=self.spec.num_devices)
        self._tables.clear(pairs)
        self._room[:, row] = _NOT_OWNED
        self._is_active[row] = False
        self._uncommitted[row] = 0

    def retain(self, row: int, num_dropped: int = 0) -> PrefixPages:
        """Keeps what a row holds now as a prefix, until `release`.

        The last `num_dropped` tokens, which every head must hold, are not part of it. The row may
        go on: what it appends to its last pages lies beyond the prefix.
        """
        held = self.lengths[:, row].astype(np.int32)
        lengths = np.maximum(held - num_dropped, 0)
        devices, pages = self._tables.pages(self._pairs(row))
        if num_dropped:
            of_pair = held > 0
            num_held = _num_pages(held[of_pair], self.spec.page_size)
            num_kept = _num_pages(lengths[of_pair], self.spec.page_size)
            index = np.arange(len(pages)) - np.repeat(np.cumsum(num_held) - num_held, num_held)
            is_kept = index < np.repeat(num_kept, num_held)
            devices, pages = devices[is_kept], pages[is_kept]
        self._pool.retain(devices, pages)
        return PrefixPages(lengths, devices, pages)

    def head_lengths(self, slot_lengths: np.ndarray) -> np.ndarray:
        """[L, K] tokens that heads hold of a row or prefix whose slots hold `slot_lengths`."""
        lengths = np.zeros((self.spec.num_layers, self._layout.num_heads), np.int32)
        layer, slot = np.nonzero(slot_lengths)
        np.maximum.at(
            lengths, (layer, self._layout.head_of_slot[layer, slot]), slot_lengths[layer, slot]
        )
        return lengths

    def share(
        self,
        row: int,
        prefix: PrefixPages,
        *,
        copies_last: bool = True,
        num_next_tokens: int = 0,
    ) -> PageCopies | None:
        """Begins an empty row with the tokens of a prefix.

        Full pages are shared. Those that the row will append to are copied: the devices must copy
        them after the prefix has been written, and before the row is read. With `copies_last` false
        they are shared as well, for a row that is to be the only one: the prefix must then be
        released.

        Returns:
            The copies; None where the pages do not suffice, also for `num_next_tokens` in this row
            and for one more token in every active row.
        """
        size, lengths = self.spec.page_size, prefix.slot_lengths
        is_partial = (lengths % size > 0) & copies_last
        num_shared = np.bincount(prefix.devices, minlength=self.spec.num_devices)
        num_copied = self._per_device(is_partial[:, None])
        opened = _num_pages(num_next_tokens - -lengths % size, size) * (lengths > 0)
        num_new = num_copied + self._per_device(opened[:, None]) + self._num_opened(1)
        if not self._has_room(num_new, num_shared - num_copied):
            return None
        layer, slot = np.nonzero(lengths)
        counts = -(-lengths[layer, slot] // size)
        copied = (np.cumsum(counts) - 1)[is_partial[layer, slot]]
        is_shared = np.ones(len(prefix.pages), bool)
        is_shared[copied] = False
        self._pool.retain(prefix.devices[is_shared], prefix.pages[is_shared])
        pages, devices = prefix.pages.copy(), prefix.devices[copied]
        pages[copied] = self._pool.take(devices)
        pairs = np.ravel_multi_index((layer, row, slot), self._room.shape)
        self._num_listed += num_shared
        self._tables.append(pairs, counts, pages)
        self._room.flat[pairs] = counts * size - lengths[layer, slot]
        return PageCopies(devices, prefix.pages[copied], pages[copied])

    def routed(self, places: Sequence[PrefixPages]) -> PrefixPages:
        """The pages of a prefix that a new row shares.

        A head that is in several places is taken from the device that holds the fewest tokens.
        """
        if len(places) == 1:
            return places[0]
        whole = PrefixPages.joined(places, self.spec.page_size)
        lengths = self.head_lengths(whole.slot_lengths)
        owner = route(self._holders(whole), lengths, self.tokens_per_device)
        return whole.in_slots(self._slot_lengths(owner, lengths) > 0, self.spec.page_size)

    def replicate(
        self, places: Sequence[PrefixPages]
    ) -> tuple[PrefixPages, PageReplication] | None:
        """Takes pages for copies of a prefix's heads on devices that hold other replicas of them.

        This happens if the next row, beside those that share the prefix already, would load one
        device too much otherwise, see `route_beyond`, and if pages are free.

        Returns:
            The new place, whose pages the devices must copy before they are shared.
        """
        size = self.spec.page_size
        whole = PrefixPages.joined(places, size)
        if (self._pool.references[whole.devices, whole.pages] < 2).all():
            return None
        lengths, holders = self.head_lengths(whole.slot_lengths), self._holders(whole)
        owner = route_beyond(self._layout.replicas, holders, lengths, self.tokens_per_device)
        is_new = ~np.take_along_axis(holders, owner[..., None], -1)[..., 0]
        layer, head = np.nonzero(is_new)
        counts = _num_pages(lengths[layer, head], size)
        targets = self._layout.slot_of_head[layer, head, owner[layer, head]]
        devices = np.repeat(targets // self.spec.slots_per_device, counts)
        needed = np.bincount(devices, minlength=self.spec.num_devices)
        if not len(layer) or (needed + self._num_opened(1) > self._pool.num_free).any():
            return None
        taken = self._pool.take(devices)
        first = self._layout.slot_of_head[layer, head, holders[layer, head].argmax(-1)]
        starts = np.searchsorted(
            whole.pairs(size), np.ravel_multi_index((layer, first), whole.slot_lengths.shape)
        )
        source = np.repeat(starts - np.cumsum(counts) + counts, counts) + np.arange(len(taken))
        slot_lengths = np.zeros_like(whole.slot_lengths)
        slot_lengths[layer, targets] = lengths[layer, head]
        pairs = np.repeat(np.ravel_multi_index((layer, targets), slot_lengths.shape), counts)
        order = np.argsort(pairs, kind="stable")
        return (
            PrefixPages(slot_lengths, devices[order], taken[order]),
            PageReplication(whole.devices[source], whole.pages[source], devices, taken),
        )

    def release(self, prefix: PrefixPages) -> None:
        """Gives back the pages of a prefix; those that rows hold remain in use."""
        self._pool.release(prefix.devices, prefix.pages)

    def take_page_table_update(self) -> PageTableUpdate:
        """What has changed in the page tables since the last call."""
        return self._tables.take_update()

    def _slot_lengths(self, owner: np.ndarray, head_lengths: np.ndarray) -> np.ndarray:
        """[L, P*C] tokens of every slot, where the devices `owner` [L, K] serve the heads."""
        slots = np.take_along_axis(self._layout.slot_of_head, owner[..., None], -1)[..., 0]
        lengths = np.zeros(self._layout.head_of_slot.shape, np.int32)
        np.put_along_axis(lengths, slots, head_lengths, axis=1)
        return lengths

    def _holders(self, prefix: PrefixPages) -> np.ndarray:
        """[L, K, P] whether the replicas of heads hold a prefix."""
        slots = self._layout.slot_of_head
        layers = np.arange(len(slots))[:, None, None]
        return self._layout.replicas & (prefix.slot_lengths[layers, slots] > 0)

    def _pairs(self, row: int) -> np.ndarray:
        """The (layer, row, slot) of a row that have pages, as flat indices."""
        layer, slot = np.nonzero(self._tables.counts[:, row])
        return np.ravel_multi_index((layer, row, slot), self._room.shape)

    def _extend(self, row: int, added: np.ndarray, num_known_tokens: int) -> bool:
        """Takes pages for `added` tokens [L, P*C] of a row; False where the pages do not suffice.

        Further tokens must fit as well, see `reserve_prompt`.
        """
        size, room = self.spec.page_size, self._room[:, row]
        grown = added + (added > 0) * (1 + num_known_tokens)
        needed = self._per_device(_num_pages(grown - room, size)[:, None]) + self._num_opened(1)
        if not self._has_room(needed):
            return False
        opened = _num_pages(added - room, size)
        room += opened * size - added
        layer, slot = np.nonzero(opened)
        pairs = np.ravel_multi_index((layer, row, slot), self._room.shape)
        self._append_new_pages(pairs, opened[layer, slot])
        return True

    def _has_room(self, num_new: np.ndarray, num_shared: np.ndarray | int = 0) -> bool:
        """Whether there are that many free pages, [P], and the page tables can list them.

        `num_shared` more are to be listed that are in use already.
        """
        num_listed = self._num_listed + num_new + num_shared
        is_listed = (num_listed <= self.spec.max_listed_pages).all()
        return bool(is_listed and (num_new <= self._pool.num_free).all())

    def _opens_page(self, num_tokens: int) -> np.ndarray:
        """[L, B, P*C] whether that many further tokens of an active row open a page."""
        return (self._room < num_tokens) & self._is_active[:, None]

    def _num_opened(self, num_tokens: int) -> np.ndarray:
        """[P] pages that at most a page of further tokens in every active row would take."""
        return self._per_device(self._opens_page(num_tokens))

    def _per_device(self, pages: np.ndarray) -> np.ndarray:
        """[P] sums of an array [L, rows, P*C]."""
        return pages.sum((0, 1)).reshape(self.spec.num_devices, -1).sum(1)

    def _append_new_pages(self, pairs: np.ndarray, counts: np.ndarray) -> None:
        """Takes pages and appends them to the tables of pairs, `counts[i]` to `pairs[i]`."""
        devices = np.repeat(pairs % self.spec.num_slots // self.spec.slots_per_device, counts)
        self._num_listed += np.bincount(devices, minlength=self.spec.num_devices)
        self._tables.append(pairs, counts, self._pool.take(devices))


def _num_pages(num_tokens: np.ndarray, page_size: int) -> np.ndarray:
    """Pages for that many tokens; none for negative numbers."""
    return np.maximum(-(-num_tokens // page_size), 0)


_NOT_OWNED = np.int32(1 << 30)
"""Room where a slot owns no part of a row: it never opens a page."""
