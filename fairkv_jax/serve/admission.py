"""Decides which requests may wait, and when the engine is given them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import groupby

from fairkv_jax.engine.request import RequestOutput, ValidatedRequest
from fairkv_jax.serve.fair_queue import FairQueue, Group
from fairkv_jax.serve.output_stream import ClientQueueFull, QueueFull, RequestRefused

_LOOKAHEAD = 4
"""Requests that the engine is given before it can start them, so that none of its rows stays free
while the event loop is busy."""


@dataclass(frozen=True)
class QueueLimits:
    max_queued: int
    """Requests that may wait beside those that run."""
    max_queued_per_client: int | None
    max_wait_s: float | None
    """Time after which a request is refused that has not been started."""


class Admission:
    """The requests that wait or run, and the limits of the queue.

    The engine serves requests in the order in which it is given them, so that the clients take
    their turns here: the engine is given only as many requests as it can start soon.
    """

    def __init__(self, limits: QueueLimits):
        self.limits = limits
        self.num_rows = 0
        """Requests that the engine can run at a time; 0 before it has been loaded."""
        self._queue = FairQueue()
        self._given: set[str] = set()
        """Unfinished requests that the engine has been given."""
        self._unstarted: dict[str, None] = {}
        """Those of them that have no output yet, in the order in which the engine takes them."""

    @property
    def max_requests(self) -> int:
        """Maximum number of running and waiting requests."""
        return self.num_rows + self.limits.max_queued

    def check_size(self, count: int) -> None:
        """Checks that `count` requests can ever wait together.

        Raises:
            RequestRefused: they are more than may wait.
        """
        limits = [(self.max_requests, "can be running or waiting", "--max-num-queued-reqs")]
        if (per_client := self.limits.max_queued_per_client) is not None:
            what = "of one client can be waiting"
            limits.append((per_client, what, "--max-num-queued-reqs-per-key"))
        most, what, option = min(limits)
        if count > most:
            raise RequestRefused(
                f"the request has {count} choices, but at most {most} {what}: send fewer prompts, "
                f"lower n, or raise {option}"
            )

    @property
    def expected_wait_s(self) -> float:
        """Time after which the requests that wait now will have been started."""
        return self._queue.expected_wait_s

    def check_room(self, client: str, count: int) -> None:
        """Checks that `count` more requests of a client may wait.

        If the queue is full, there is room for a client that has less in it than others.

        Raises:
            QueueFull: there is no room; `ClientQueueFull`, if only this client has none.
        """
        own, most = self._queue.count(client), self.limits.max_queued_per_client
        if most is not None and own + count > most:
            raise ClientQueueFull(
                f"{own} requests of this client are waiting, and {count} more would exceed the "
                f"limit of {most}: try again later, or raise --max-num-queued-reqs-per-key",
                self.expected_wait_s,
            )
        if self._giving_way(client, count) is None:
            raise QueueFull(
                f"{self._num_requests} requests are running or waiting, and {count} more would "
                f"exceed the limit of {self.max_requests}: try again later, or raise "
                "--max-num-queued-reqs",
                self.expected_wait_s,
            )

    def requests_giving_way(self, client: str, count: int) -> list[str]:
        """Returns one request id of each HTTP request that must end to make room for `count`."""
        return [groups[0][0].request_id for groups in self._giving_way(client, count) or []]

    def add(self, client: str, requests: Sequence[ValidatedRequest]) -> None:
        """Puts an HTTP request into the queue; the choices of a prompt are adjacent."""
        groups = groupby(requests, lambda each: each.request.same_prompt or each.request_id)
        self._queue.push(client, [tuple(group) for _, group in groups])

    def release(self) -> list[Group]:
        """Takes from the queue what the engine is to be given now."""
        groups = []
        while (
            self._queue
            and len(self._given) < self.num_rows + _LOOKAHEAD
            and len(self._unstarted) < _LOOKAHEAD
        ):
            group = self._queue.pop()
            request_ids = [request.request_id for request in group]
            self._given.update(request_ids)
            self._unstarted.update(dict.fromkeys(request_ids))
            groups.append(group)
        return groups

    def advance(self, output: RequestOutput) -> None:
        """Records that the engine has started a request, and perhaps finished it."""
        self._unstarted.pop(output.request_id, None)
        if output.finished:
            self._given.discard(output.request_id)

    def may_have_started(self, request_ids: Collection[str]) -> bool:
        """Whether the engine may have started a request that has no output yet.

        The engine starts its requests one after the other, if there is a free row.
        """
        has_free_row = len(self._given) - len(self._unstarted) < self.num_rows
        return has_free_row and next(iter(self._unstarted), None) in request_ids

    def remove(self, request_ids: Collection[str]) -> set[str]:
        """Forgets requests; returns the ids of those that the engine has been given."""
        self._queue.remove(request_ids)
        given = self._given.intersection(request_ids)
        self._given -= given
        for request_id in given:
            self._unstarted.pop(request_id, None)
        return given

    def clear(self) -> None:
        self._queue.clear()
        self._given.clear()
        self._unstarted.clear()

    @property
    def _num_requests(self) -> int:
        return len(self._queue) + len(self._given)

    def _giving_way(self, client: str, count: int) -> list[Sequence[Group]] | None:
        """The HTTP requests that give way to `count` requests; None if there is no room."""
        missing = self._num_requests + count - self.max_requests
        return self._queue.newest(missing, more_than=self._queue.count(client) + count)
