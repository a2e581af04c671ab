"""Prefixes of prompts whose compressed cache is kept, so that other requests can begin with them.

A prompt is a chain of segments, each of which is compressed at its own end, whether its cache is
found or computed: a hit saves work and changes no token. What is kept of all segments up to the end
of one is a `Prefix`. Its pages may be evicted when others need them; it is then computed again by
the next request that begins with it.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from fairkv_jax.engine.kv_cache_manager import KVCacheManager
from fairkv_jax.engine.page_tables import PageReplication
from fairkv_jax.engine.prefix_pages import PrefixPages


@dataclass(eq=False)
class Prefix:
    """The beginning of prompts, up to the end of one of their segments."""

    key: str
    """See `prefix_key`."""
    num_tokens: int
    """From the start of the prompt, also those that compression drops."""
    parent: "Prefix | None" = None
    """The prefix that its last segment follows, if it has several."""
    head_lengths: np.ndarray | None = None
    """[L, K] tokens kept; None before it has been computed once."""
    pages: PrefixPages | None = None
    """None while its cache is not there."""
    copies: list[PrefixPages] = field(default_factory=list)
    """Further places of some of its heads, on other devices; they go before `pages` do."""
    users: set[str] = field(default_factory=set)
    """Ids of the requests that need it to remain where it is."""
    is_deleted: bool = False
    """Whether its pages go as soon as no request uses it; so do those of prefixes that go on after
    it."""

    @property
    def is_unwanted(self) -> bool:
        """Whether it has been deleted, or a prefix before it."""
        return any(each.is_deleted for each in self.chain())

    @property
    def places(self) -> list[PrefixPages]:
        """All that there is of its cache."""
        return [] if self.pages is None else [self.pages, *self.copies]

    def chain(self) -> "Iterator[Prefix]":
        """Yields the prefix, then those that it goes on after, the shortest last."""
        prefix: Prefix | None = self
        while prefix is not None:
            yield prefix
            prefix = prefix.parent


def prefix_key(token_ids: Sequence[int], options: object) -> str:
    """Returns the name of a prefix: a hash of its tokens and of `options`.

    `options` are everything else that tells prefixes apart, as JSON can write it, or dataclasses.
    """
    digest = hashlib.sha256(json.dumps(options, default=asdict).encode())
    digest.update(np.asarray(token_ids, np.int64).tobytes())
    return digest.hexdigest()[:32]


class PrefixCache:
    """The prefixes whose pages are in the KV cache; evicted least recently used first.

    Of prefixes that go on after one another, the longest is evicted first: its last pages are its
    own, and what others may have in common with it stays.
    """

    def __init__(self, kv_cache: KVCacheManager, fraction: float = 1.0):
        """`fraction` of the KV cache is what prefixes may hold while no request uses them."""
        self._kv_cache = kv_cache
        self._most_pages = int(fraction * kv_cache.spec.pages_per_device)
        self._cached: dict[Prefix, None] = {}
        """A set in the order of use: the least recently used comes first."""
        spec = kv_cache.spec
        self._references = np.zeros((spec.num_devices, spec.pages_per_device), np.int32)
        """How many prefixes hold each page."""
        self._num_pages = np.zeros(spec.num_devices, np.int64)
        self._replications: list[PageReplication] = []

    def __len__(self) -> int:
        return len(self._cached)

    def __iter__(self) -> Iterator[Prefix]:
        """The least recently used first."""
        return iter(self._cached)

    def recently_used(self, most: int) -> list[Prefix]:
        """Returns at most `most` prefixes, the most recently used first; for any thread."""
        return list(self._cached)[: -most - 1 : -1]

    @property
    def has_unused(self) -> bool:
        """Whether there is a prefix that can be evicted without harm to any request."""
        return any(not prefix.users for prefix in self._cached)

    @property
    def num_pages(self) -> np.ndarray:
        """[P] pages that prefixes hold on every device."""
        return self._num_pages.copy()

    def retain(self, prefix: Prefix, row: int, num_dropped: int = 0) -> None:
        """Keeps what a row holds as a prefix, unless it is there already.

        The row's last `num_dropped` tokens are not part of it.
        """
        if prefix.pages is None:
            pages = prefix.pages = self._kv_cache.retain(row, num_dropped)
            prefix.head_lengths = self._kv_cache.head_lengths(pages.slot_lengths)
            self._count(pages, 1)
        self._touch(prefix)
        self._evict_surplus()

    def use(self, prefix: Prefix, request_id: str) -> None:
        """Notes that a request needs a prefix; until `leave`, `evict_unused` spares it."""
        prefix.users.add(request_id)
        if prefix.pages is not None:
            self._touch(prefix)

    def replicate(self, prefix: Prefix, share: Callable[[], Any]) -> Any:
        """Copies heads of a prefix to other devices, if the rows that share it overload one.

        That is undone if `share`, which begins the next row, then returns None for lack of pages,
        or if prefixes would hold more than their share of the cache. Returns what `share` returned;
        None where nothing has been copied.
        """
        made = self._kv_cache.replicate(prefix.places)
        if made is None:
            return None
        pages, replication = made
        prefix.copies.append(pages)
        self._count(pages, 1)
        shared = None if self._num_pages.max() > self._most_pages else share()
        if shared is None:
            self._give_back(prefix.copies.pop())
        else:
            self._replications.append(replication)
        return shared

    def take_replications(self) -> tuple[PageReplication, ...]:
        """What the devices are to copy before they do what follows, since the last call."""
        taken, self._replications = tuple(self._replications), []
        return taken

    def leave(self, prefix: Prefix, request_id: str) -> None:
        """Notes that a request needs a prefix no more."""
        prefix.users.discard(request_id)
        if prefix.is_unwanted and not prefix.users:
            self.evict(prefix)
        self._evict_surplus()

    def delete(self, prefix: Prefix) -> None:
        """Gives up a prefix, and those that go on after it; requests that use them go on."""
        prefix.is_deleted = True
        for each in list(self._cached):
            if each.is_unwanted and not each.users:
                self.evict(each)

    def evict(self, prefix: Prefix) -> None:
        """Gives back the pages of a prefix, if they are there; rows keep those that they share."""
        while prefix.copies:
            self._give_back(prefix.copies.pop())
        if prefix.pages is not None:
            self._give_back(prefix.pages)
            prefix.pages = None
            del self._cached[prefix]

    def evict_until(self, take: Callable[[], Any], *, any_prefix: bool = False) -> Any:
        """Calls `take` until it succeeds, and evicts a prefix after each failure.

        Those that requests use are evicted only with `any_prefix`. Returns what `take` returned
        last: None or False where nothing is left to be evicted.
        """
        while (taken := take()) is None or taken is False:
            if not self.evict_unused() and not (any_prefix and self.evict_any()):
                break
        return taken

    def evict_unused(self) -> bool:
        """Gives back the least recently used copies, else the prefix that no request uses.

        False where there is neither.
        """
        for prefix in self._cached:
            if prefix.copies:
                self._give_back(prefix.copies.pop())
                return True
        return self._evict_first(lambda prefix: not prefix.users)

    def evict_any(self) -> bool:
        """Gives back the pages of the least recently used prefix, if there is any.

        Requests that use it keep those that their rows share.
        """
        return self._evict_first(lambda prefix: True)

    def clear(self) -> None:
        """Gives back the pages of all prefixes."""
        while self.evict_any():
            pass

    def _evict_surplus(self) -> None:
        """Evicts prefixes that no request uses until the others are within their share."""
        while self.num_pages.max() > self._most_pages and self.evict_unused():
            pass

    def _touch(self, prefix: Prefix) -> None:
        """Makes a prefix the most recently used, after those that it goes on after."""
        for each in prefix.chain():
            if each.pages is not None:
                self._cached.pop(each, None)
                self._cached[each] = None

    def _give_back(self, pages: PrefixPages) -> None:
        self._kv_cache.release(pages)
        self._count(pages, -1)

    def _count(self, pages: PrefixPages, change: int) -> None:
        """Counts the pages of a prefix that is cached now (1), or no longer (-1)."""
        held, at = self._references, (pages.devices, pages.pages)
        is_counted = held[at] == (0 if change > 0 else 1)
        held[at] += change
        self._num_pages += change * np.bincount(
            pages.devices[is_counted], minlength=len(self._num_pages)
        )

    def _evict_first(self, may_go: Callable[[Prefix], bool]) -> bool:
        for prefix in self._cached:
            if may_go(prefix):
                self.evict(prefix)
                return True
        return False
