"""Which pages hold a cached prefix."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class PrefixPages:
    """The pages of a prefix, or of a part of its heads, with a reference to each of them.

    A head that has been copied for the rows of another device is there several times, once in each
    of the slots that hold it.
    """

    slot_lengths: np.ndarray
    """[L, P*C] tokens of the slots that hold the prefix, 0 in the others."""
    devices: np.ndarray
    """[n] the device of every page, in the order of layers, slots and tokens."""
    pages: np.ndarray
    """[n] page numbers within the device."""

    @classmethod
    def joined(cls, places: Sequence["PrefixPages"], page_size: int) -> "PrefixPages":
        """All places of a prefix together; no slot holds it twice."""
        if len(places) == 1:
            return places[0]
        order = np.argsort(
            np.concatenate([place.pairs(page_size) for place in places]), kind="stable"
        )
        return cls(
            np.sum([place.slot_lengths for place in places], axis=0),
            np.concatenate([place.devices for place in places])[order],
            np.concatenate([place.pages for place in places])[order],
        )

    def in_slots(self, is_wanted: np.ndarray, page_size: int) -> "PrefixPages":
        """The part that lies in some of the slots, bool [L, P*C]."""
        is_kept = is_wanted.flat[self.pairs(page_size)]
        lengths = np.where(is_wanted, self.slot_lengths, 0)
        return PrefixPages(lengths, self.devices[is_kept], self.pages[is_kept])

    def pairs(self, page_size: int) -> np.ndarray:
        """[n] the (layer, slot) of every page, as a flat index."""
        pairs = np.flatnonzero(self.slot_lengths)
        return np.repeat(pairs, -(-self.slot_lengths.flat[pairs] // page_size))
