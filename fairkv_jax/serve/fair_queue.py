"""The requests that wait for the engine. Their clients take turns."""

import time
from collections import deque
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass

from fairkv_jax.engine.request import ValidatedRequest

Group = tuple[ValidatedRequest, ...]
"""The choices of one prompt, which the engine gets together because they share its prefill."""


@dataclass(eq=False)
class _Batch:
    """The waiting groups of one HTTP request."""

    groups: deque[Group]
    has_begun: bool = False
    """Whether a group of it has left the queue."""

    def __len__(self) -> int:
        return sum(map(len, self.groups))


_NUM_MEASURED = 32
"""Number of the latest groups from whose departures the speed of the queue is measured."""


class FairQueue:
    """A queue for each client. The clients take turns, so that a flood of one delays no other.

    Turns are numbered. A client that has taken a group of `n` requests is served next `n` turns
    later, and one that comes in between is served in the next turn. The groups of one client leave
    in the order in which they came.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, deque[_Batch]] = {}
        self._turn = 0
        """The turn of the group that has left last."""
        self._next_turn: dict[str, int] = {}
        """The turn of a client's next group; it may be known although no group is waiting."""
        self._left: deque[tuple[float, int]] = deque(maxlen=_NUM_MEASURED)
        """When groups have left, in seconds of `time.monotonic`, and their numbers of requests.

        The first entry only says when the time begins that the others are measured in.
        """

    def __len__(self) -> int:
        """Number of waiting requests."""
        return sum(map(self.count, self._waiting))

    def __iter__(self) -> Iterator[ValidatedRequest]:
        batches = (batch for batches in self._waiting.values() for batch in batches)
        return (each for batch in batches for group in batch.groups for each in group)

    def count(self, client: str) -> int:
        """Number of waiting requests of a client."""
        return sum(map(len, self._waiting.get(client, ())))

    def push(self, client: str, groups: Iterable[Group]) -> None:
        """Adds the groups of one HTTP request."""
        if not self._waiting:
            self._left.clear()
            self._left.append((time.monotonic(), 0))
        if client not in self._waiting:
            self._waiting[client] = deque()
            self._next_turn[client] = max(self._next_turn.get(client, 0), self._turn + 1)
        self._waiting[client].append(_Batch(deque(groups)))

    def pop(self) -> Group:
        """Removes and returns the next group of the client whose turn it is."""
        client = min(self._waiting, key=self._next_turn.__getitem__)
        batch = self._waiting[client][0]
        group = batch.groups.popleft()
        batch.has_begun = True
        if not batch.groups:
            self._waiting[client].popleft()
        self._turn = self._next_turn[client]
        self._next_turn[client] += len(group)
        self._left.append((time.monotonic(), len(group)))
        self._forget_idle_clients()
        return group

    def remove(self, request_ids: Container[str]) -> set[str]:
        """Removes requests; returns the ids of those that were waiting."""
        removed = {each.request_id for each in self if each.request_id in request_ids}
        if removed:
            for client, batches in self._waiting.items():
                for batch in batches:
                    kept = (
                        tuple(each for each in group if each.request_id not in removed)
                        for group in batch.groups
                    )
                    batch.groups = deque(filter(None, kept))
                self._waiting[client] = deque(batch for batch in batches if batch.groups)
            self._forget_idle_clients()
        return removed

    def newest(self, num_requests: int, more_than: int) -> list[Sequence[Group]] | None:
        """Returns the HTTP requests that give way where a client needs room for `num_requests`.

        They are the newest ones of the clients with the most requests, as long as these have more
        than `more_than`, and none of which the engine has a part already. None if there are not
        enough of them.
        """
        counts = {client: self.count(client) for client in self._waiting}
        newest = {
            client: (batch for batch in reversed(batches) if not batch.has_begun)
            for client, batches in self._waiting.items()
        }
        found: list[_Batch] = []
        while num_requests > 0:
            client = max(counts, key=counts.__getitem__, default=None)
            if client is None or counts[client] <= more_than:
                return None
            batch = next(newest[client], None)
            if batch is None:
                del counts[client]
                continue
            found.append(batch)
            counts[client] -= len(batch)
            num_requests -= len(batch)
        for batch in list(found):  # A large one that was found later may spare earlier ones.
            if len(batch) <= -num_requests:
                found.remove(batch)
                num_requests += len(batch)
        return [batch.groups for batch in found]

    def clear(self) -> None:
        self._waiting.clear()
        self._forget_idle_clients()

    @property
    def expected_wait_s(self) -> float:
        """Seconds until all waiting requests have left, at the speed of the latest ones."""
        if not self._waiting:
            return 0.0
        seconds = time.monotonic() - self._left[0][0]
        num_left = sum(count for _, count in self._left) - self._left[0][1]
        return len(self) * seconds / max(num_left, 1)

    def _forget_idle_clients(self) -> None:
        """Forgets clients that have nothing to wait for and could be served in the next turn.

        While nothing waits, nobody has to give way: then all turns are forgotten.
        """
        self._waiting = {client: batches for client, batches in self._waiting.items() if batches}
        self._next_turn = {
            client: turn
            for client, turn in self._next_turn.items()
            if client in self._waiting or (self._waiting and turn > self._turn + 1)
        }
