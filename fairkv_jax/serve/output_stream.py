"""The outputs of a client's requests, and the exceptions with which requests fail."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

from fairkv_jax.engine.request import Request, RequestOutput


class EngineUnavailable(Exception):
    """The engine is not ready yet, has stopped or has failed."""


class RequestRefused(Exception):
    """The request is invalid and retrying cannot help; the message says what is wrong with it."""


class GenerationFailed(Exception):
    """The engine could not complete a request; the message says why. Other requests go on."""


class QueueFull(Exception):
    """There are too many requests, or a request has waited for too long.

    `retry_after_s` is the time after which there is probably room.
    """

    def __init__(self, message: str, retry_after_s: float):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ClientQueueFull(QueueFull):
    """A client has as many requests in the queue as it may have; there may be room for others."""


class OutputStream:
    """Streams the outputs of the requests of one HTTP request, each with its index among them.

    Outputs are cumulative, so only the first and the latest one of each request are stored: a slow
    client uses no extra memory and receives fewer, longer pieces, but the first token for itself.
    """

    def __init__(self, requests: Sequence[Request], on_close: Callable[["OutputStream"], None]):
        """`on_close` aborts the requests that have not finished."""
        self.requests = requests
        self.latest: dict[int, RequestOutput] = {}
        """The latest outputs by index; requests without output are missing."""
        self.expiry: asyncio.TimerHandle | None = None
        """The timer of --max-queue-wait."""
        self._on_close = on_close
        self._indices = {request.request_id: index for index, request in enumerate(requests)}
        self._unfinished = set(self._indices)
        self._fresh: set[int] = set()
        self._first: dict[int, RequestOutput] = {}
        """First outputs that have not been read; the others are replaced by later ones."""
        self._error: Exception | None = None
        self._news = asyncio.Event()

    @property
    def request_ids(self) -> set[str]:
        return set(self._indices)

    @property
    def unfinished_ids(self) -> set[str]:
        return set(self._unfinished)

    def put(self, output: RequestOutput) -> None:
        index = self._indices[output.request_id]
        if index not in self.latest:
            self._first[index] = output
        self.latest[index] = output
        self._fresh.add(index)
        if output.finished:
            self._unfinished.discard(output.request_id)
        self._news.set()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._news.set()

    def close(self) -> None:
        self._on_close(self)
        self._unfinished = set()

    async def __aiter__(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        """Yields (index, output) pairs.

        Raises:
            EngineUnavailable: the engine failed or stopped.
            RequestRefused: the engine rejected the request.
            GenerationFailed: the engine could not complete the request.
            QueueFull: the request had to give way to others, or has waited for too long.
        """
        while True:
            await self._news.wait()
            self._news.clear()
            for index in sorted(self._fresh):
                first = self._first.pop(index, None)
                if first is not None:
                    yield index, first
                # More may have come while the reader was busy; it is read now, and only once.
                self._fresh.discard(index)
                if first is not self.latest[index]:
                    yield index, self.latest[index]
            if self._error is not None:
                raise self._error
            if not self._unfinished and not self._fresh:
                return

    async def started(self) -> None:
        """Waits for the first output.

        Raises:
            Exception: the requests have failed before it; see `__aiter__`.
        """
        while not self.latest:
            await self._news.wait()
            if self._error is not None and not self.latest:
                raise self._error
        self._news.set()  # the iteration waits for it too

    async def collect(self) -> list[RequestOutput]:
        """Waits for all requests and returns their outputs in the order of the requests."""
        outputs = {index: output async for index, output in self}
        return [outputs[index] for index in range(len(self._indices))]
