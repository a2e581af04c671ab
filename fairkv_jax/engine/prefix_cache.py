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

from fairkv_jax.engine.kv_cache_manager import KVCacheManager, PrefixPages


@dataclass(eq=False)
class Prefix:
    """The beginning of prompts, up to the end of one of their segments."""

    key: str
    """See `prefix_key`."""
    num_tokens: int
    """From the start of the prompt, also those that compression drops."""
    head_lengths: np.ndarray | None = None
    """[L, K] tokens kept; None before it has been computed once."""
    pages: PrefixPages | None = None
    """None while its cache is not there."""
    users: set[str] = field(default_factory=set)
    """Ids of the requests that need it to remain where it is."""
    is_deleted: bool = False
    """Whether its pages go as soon as no request uses it."""


def prefix_key(token_ids: Sequence[int], options: object) -> str:
    """Returns the name of a prefix: a hash of its tokens and of `options`.

    `options` are everything else that tells prefixes apart, as JSON can write it, or dataclasses.
    """
    digest = hashlib.sha256(json.dumps(options, default=asdict).encode())
    digest.update(np.asarray(token_ids, np.int64).tobytes())
    return digest.hexdigest()[:32]


class PrefixCache:
    """The prefixes whose pages are in the KV cache; evicted least recently used first."""

    def __init__(self, kv_cache: KVCacheManager, fraction: float = 1.0):
        """`fraction` of the KV cache is what prefixes may hold while no request uses them."""
        self._kv_cache = kv_cache
        self._most_pages = int(fraction * kv_cache.spec.pages_per_device)
        self._cached: dict[Prefix, None] = {}
        """A set in the order of use: the least recently used comes first."""

    def __len__(self) -> int:
        return len(self._cached)

    def __iter__(self) -> Iterator[Prefix]:
        """The least recently used first."""
        return iter(self._cached)

    @property
    def has_unused(self) -> bool:
        """Whether there are pages that can be evicted without harm to any request."""
        return any(not prefix.users for prefix in self._cached)

    @property
    def num_pages(self) -> np.ndarray:
        """[P] pages that prefixes hold on every device; a page of two prefixes counts twice."""
        devices = [prefix.pages.devices for prefix in self._cached if prefix.pages is not None]
        joined = np.concatenate([np.zeros(0, np.int64), *devices])
        return np.bincount(joined, minlength=self._kv_cache.spec.num_devices)

    def retain(self, prefix: Prefix, row: int, head_lengths: np.ndarray) -> None:
        """Keeps what a row holds as a prefix, unless it is there already."""
        if prefix.pages is None:
            prefix.pages = self._kv_cache.retain(row)
            prefix.head_lengths = head_lengths
        self._touch(prefix)
        self._evict_surplus()

    def use(self, prefix: Prefix, request_id: str) -> None:
        """Notes that a request needs a prefix; until `leave`, `evict_unused` spares it."""
        prefix.users.add(request_id)
        if prefix.pages is not None:
            self._touch(prefix)

    def leave(self, prefix: Prefix, request_id: str) -> None:
        """Notes that a request needs a prefix no more."""
        prefix.users.discard(request_id)
        if prefix.is_deleted and not prefix.users:
            self.evict(prefix)
        self._evict_surplus()

    def delete(self, prefix: Prefix) -> None:
        """Gives up a prefix; requests that use it go on."""
        prefix.is_deleted = True
        if not prefix.users:
            self.evict(prefix)

    def evict(self, prefix: Prefix) -> None:
        """Gives back the pages of a prefix, if they are there; rows keep those that they share."""
        if prefix.pages is not None:
            self._kv_cache.release(prefix.pages)
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
        """Gives back the pages of the least recently used prefix that no request uses, if any."""
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
        self._cached.pop(prefix, None)
        self._cached[prefix] = None

    def _evict_first(self, may_go: Callable[[Prefix], bool]) -> bool:
        for prefix in self._cached:
            if may_go(prefix):
                self.evict(prefix)
                return True
        return False
