"""Page tables as one flat list of page numbers, so that their size follows what rows hold."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PageTable:
    """Which pages of this device's pool hold the tokens of each (layer, row, slot).

    The layout is that of FlashInfer's `kv_indices` and `kv_indptr`. Page i of a (layer, row, slot)
    is `pages[starts[layer, row, slot] + i]`; how many of them count follows from its length:

        pages    7 2 | 4 | 0 9 5 | . .          one list for all layers, rows and slots
        starts   0     2   3                    where each (layer, row, slot) begins

    Entries need not be contiguous, nor all in use, and several slots may share some. Readers clip
    to the list, so that a start or length that is too large never reads outside it.
    """

    pages: Int[Array, "E"]
    starts: Int[Array, "*axes C"]
    """[B,C], or [L,B,C]; [C] for a single row."""

    @classmethod
    def from_dense(cls, table: Int[Array, "*L B C max_pages"]) -> "PageTable":
        """The table in which every (layer, row, slot) has `max_pages` entries."""
        *shape, max_pages = table.shape
        count = table.size // max(max_pages, 1)
        starts = jnp.arange(count, dtype=jnp.int32) * max_pages
        return cls(table.reshape(-1), starts.reshape(shape))

    @property
    def num_entries(self) -> int:
        return self.pages.shape[0]

    def of_layer(self, layer: Int[Array, ""] | int | None) -> "PageTable":
        """The table of one layer, without a layer axis; `layer=None`: it has none already."""
        return replace(self, starts=of_layer(self.starts, layer))

    def entries(self, start: Int[Array, "..."], page: Int[Array, "..."]) -> Int[Array, "..."]:
        """The numbers pages[start + page], where the index is clipped to the list."""
        return jnp.take(self.pages, start + page, mode="clip")


def of_layer(values: Int[Array, "*L B C"], layer: Int[Array, ""] | int | None) -> Array:
    """One layer's part of an array with a leading layer axis; `layer=None`: it has none."""
    if layer is None:
        return values
    return jax.lax.dynamic_index_in_dim(values, layer, keepdims=False)
