"""The requests that wait for the engine. Their clients take turns."""

import time
from collections import deque
from collections.abc import Container, Iterator

from fairkv_jax.engine.request import ValidatedRequest

Group = tuple[ValidatedRequest, ...]
"""The choices of one prompt, which the engine gets together because they share its prefill."""

_NUM_MEASURED = 32
"""Number of the latest groups from whose departures the speed of the queue is measured."""


class FairQueue:
    """A queue for each client. The clients take turns, so that a flood of one delays no other.

    Turns are numbered. A client that has taken a group of `n` requests is served next `n` turns
    later, and one that comes in between is served in the next turn. The groups of one client leave
    in the order in which they came.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, deque[Group]] = {}
        self._turn = 0
        """The turn of the group that has left last."""
        self._next_turn: dict[str, int] = {}
        """The turn of a client's next group; it may be known although no group is waiting."""
        self._left: deque[tuple[float, int]] = deque(maxlen=_NUM_MEASURED)
        """When groups have left, in seconds of `time.monotonic`, and their numbers of requests.

        The first is the beginning, or a group that left before those that are counted.
        """

    def __len__(self) -> int:
        """Number of waiting requests."""
        return sum(map(self.count, self._waiting))

    def __iter__(self) -> Iterator[ValidatedRequest]:
        return (each for groups in self._waiting.values() for group in groups for each in group)

    def count(self, client: str) -> int:
        """Number of waiting requests of a client."""
        return sum(map(len, self._waiting.get(client, ())))

    def push(self, client: str, group: Group) -> None:
        if not self._waiting:
            self._left.clear()
            self._left.append((time.monotonic(), 0))
        if client not in self._waiting:
            self._waiting[client] = deque()
            self._next_turn[client] = max(self._next_turn.get(client, 0), self._turn + 1)
        self._waiting[client].append(group)

    def pop(self) -> Group:
        """Removes and returns the next group of the client whose turn it is."""
        client = min(self._waiting, key=self._next_turn.__getitem__)
        group = self._waiting[client].popleft()
        self._turn = self._next_turn[client]
        self._next_turn[client] += len(group)
        self._left.append((time.monotonic(), len(group)))
        self._forget_idle_clients()
        return group

    def remove(self, request_ids: Container[str]) -> set[str]:
        """Removes requests; returns the ids of those that were waiting."""
        removed = {each.request_id for each in self if each.request_id in request_ids}
        if removed:
            for client, groups in self._waiting.items():
                kept = [tuple(r for r in group if r.request_id not in removed) for group in groups]
                self._waiting[client] = deque(filter(None, kept))
            self._forget_idle_clients()
        return removed

    def newest(self, num_requests: int, more_than: int) -> list[Group] | None:
        """Returns the groups that give way where a client needs room for `num_requests`.

        They are the newest ones of the clients with the most requests, as long as these have more
        than `more_than`. None if such clients do not have enough.
        """
        counts = {client: self.count(client) for client in self._waiting}
        newest = {client: reversed(groups) for client, groups in self._waiting.items()}
        found: list[Group] = []
        while num_requests > 0:
            client = max(counts, key=counts.__getitem__, default=None)
            if client is None or counts[client] <= more_than:
                return None
            group = next(newest[client])
            found.append(group)
            counts[client] -= len(group)
            num_requests -= len(group)
        return found

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
        self._waiting = {client: groups for client, groups in self._waiting.items() if groups}
        self._next_turn = {
            client: turn
            for client, turn in self._next_turn.items()
            if client in self._waiting or (self._waiting and turn > self._turn + 1)
        }
