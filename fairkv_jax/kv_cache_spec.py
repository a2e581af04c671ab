"""The sizes of the KV cache, counted once: pages, page tables, and their bytes."""

from dataclasses import dataclass, fields, replace
from typing import Any

SPARE_ENTRIES = 12
"""Entries that a short segment of a page table may have beyond its pages; a long one has a quarter
more than its pages, and these."""
_ENTRY_BYTES = 4
_ENTRIES_PER_PAGE = 2.5
INT8 = "int8"
"""The type of quantised pages; the others are floating-point types."""
SCALE_DTYPE = "bfloat16"
"""The type of the scales of quantised pages."""
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, INT8: 1}


@dataclass(frozen=True)
class QueryStore:
    """The last queries of every row, which score its tokens when it is compressed again."""

    num_queries: int
    """Queries of each row, layer and query head."""
    group_size: int
    """Query heads per KV head (G)."""
    dtype: str

    def bytes_per_slot(self, head_dim: int) -> int:
        """Bytes of a row's queries in one layer and head slot."""
        return self.num_queries * self.group_size * head_dim * _ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class KVCacheSpec:
    """The sizes of the paged KV cache: its pages, its page tables, and what they take in bytes.

    Every device holds `pages_per_device` pages, shared by all layers, and a flat list of
    `table_entries` page numbers. The list is sized by the pages that there are, not by the longest
    request times the rows: a (layer, row, slot) holds a segment of it, as long as it needs.

    Raises:
        ValueError: a size is not positive.
    """

    num_layers: int
    num_rows: int
    """Rows of the decode batch (B)."""
    num_devices: int
    slots_per_device: int
    """Head slots of each layer on each device (C)."""
    head_dim: int
    page_size: int
    """Tokens per page."""
    pages_per_device: int
    max_tokens: int
    """Most tokens of one row, prompt and output together."""
    dtype: str = "float32"
    """The type of the pages: a floating-point type, or "int8" with a scale per token for keys and
    one for values."""
    sharing: int = 1
    """How many times the pages of a device the page tables can list, for rows that share pages."""
    queries: QueryStore | None = None
    """None where rows are not compressed while they decode, or no queries are needed for that."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{field.name} must be at least 1, got {value}")

    @classmethod
    def fit(cls, num_bytes: int, max_pages_per_device: int, **sizes: Any) -> "KVCacheSpec":
        """The largest cache of at most `num_bytes` over all devices, all of its arrays included.

        `sizes` are the other fields. Where not even one page fits, the cache has one.
        """
        least = cls(pages_per_device=1, **sizes)
        per_page = least.page_bytes + _ENTRY_BYTES * _ENTRIES_PER_PAGE * least.sharing
        room = num_bytes // least.num_devices - least.bytes_per_device + per_page
        pages = min(int(room // per_page), max_pages_per_device)
        return replace(least, pages_per_device=max(pages, 1))

    @property
    def is_quantized(self) -> bool:
        """Whether the pages are int8, with scales."""
        return self.dtype == INT8

    @property
    def num_slots(self) -> int:
        """Slots of one layer over all devices, P*C."""
        return self.num_devices * self.slots_per_device

    @property
    def page_bytes(self) -> int:
        """Bytes of one page: its keys and its values, and their scales if it has any."""
        return self.page_size * token_bytes(self.head_dim, self.dtype)

    @property
    def pool_bytes_per_device(self) -> int:
        """Bytes of the pages of each device."""
        return self.pages_per_device * self.page_bytes

    @property
    def max_listed_pages(self) -> int:
        """Most pages of all rows on one device; a page that rows share counts for each of them."""
        return self.sharing * self.pages_per_device

    @property
    def table_entries(self) -> int:
        """Entries of a device's list of page numbers.

        Twice what the segments of `max_listed_pages` take, so that moving segments together, when
        the end of the list is reached, makes room for as much again.
        """
        pairs = self.num_layers * self.num_rows * self.slots_per_device
        return int(_ENTRIES_PER_PAGE * self.max_listed_pages) + 2 * SPARE_ENTRIES * pairs

    @property
    def table_bytes_per_device(self) -> int:
        """Bytes of a device's page tables: the list, where segments start, and the lengths."""
        pairs = self.num_layers * self.num_rows * self.slots_per_device
        return _ENTRY_BYTES * (self.table_entries + 2 * pairs)

    @property
    def bytes_per_device(self) -> int:
        """Bytes of the cache on each device: pages, page tables, token ids, and queries."""
        tokens = _ENTRY_BYTES * self.num_rows * (self.max_tokens + 1)
        pages = self.pool_bytes_per_device + self.table_bytes_per_device
        return pages + tokens + self.query_bytes_per_device

    @property
    def query_bytes_per_device(self) -> int:
        """Bytes of the last queries of all rows on each device."""
        if self.queries is None:
            return 0
        pairs = self.num_layers * self.num_rows * self.slots_per_device
        return pairs * self.queries.bytes_per_slot(self.head_dim)


def token_bytes(head_dim: int, dtype: str) -> int:
    """Bytes of the key and the value of one token in one layer and KV head, scales included."""
    scale_bytes = _ITEM_BYTES[SCALE_DTYPE] if dtype == INT8 else 0
    return 2 * (head_dim * _ITEM_BYTES[dtype] + scale_bytes)
