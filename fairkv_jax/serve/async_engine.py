"""Connects the event loop, which serves the clients, with the thread that runs the engine.

event loop                      engine thread
submit() ── Add ──► mailbox ──► add_request()
close()  ── Abort ►        ──► abort_request()
OutputStream ◄── call_soon_threadsafe ── step()
"""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from enum import Enum
from queue import Empty, SimpleQueue

from fairkv_jax.engine.prefix_registry import UnknownPrefix
from fairkv_jax.engine.request import Request, RequestOutput, ValidatedRequest
from fairkv_jax.engine.stats import EngineStats
from fairkv_jax.serve.engine_protocol import Engine, Observer

log = logging.getLogger(__name__)


class State(Enum):
    """The states of an engine; requests are accepted only in the state `READY`."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    """Accepted requests are finished, and new ones are rejected."""
    FAILED = "failed"
    STOPPED = "stopped"


class EngineUnavailable(Exception):
    """The engine is not ready yet, has stopped or has failed."""


class RequestRefused(Exception):
    """The request is invalid and retrying cannot help; the message says what is wrong with it."""


class GenerationFailed(Exception):
    """The engine could not complete a request; the message says why. Other requests go on."""


class QueueFull(Exception):
    """The queue has reached its maximum number of requests."""


@dataclass(frozen=True)
class _Add:
    request: ValidatedRequest


@dataclass(frozen=True)
class _Abort:
    request_id: str


@dataclass(frozen=True)
class _DeletePrefix:
    prefix_id: str
    owner: str
    done: "asyncio.Future[None]"


class _Stop: ...


_Message = _Add | _Abort | _DeletePrefix | _Stop


class OutputStream:
    """Streams the outputs of a group of requests, each with its index in the group.

    Outputs are cumulative, so only the first and the latest one of each request are stored: a slow
    client uses no extra memory and receives fewer, longer pieces, but the first token for itself.
    `close` aborts the requests that still run.
    """

    def __init__(self, engine: "AsyncEngine", requests: Sequence[Request]):
        self.requests = requests
        self.latest: dict[int, RequestOutput] = {}
        """The latest outputs by index in the group; requests without output are missing."""
        self._engine = engine
        self._indices = {request.request_id: index for index, request in enumerate(requests)}
        self._unfinished = set(self._indices)
        self._fresh: set[int] = set()
        self._first: dict[int, RequestOutput] = {}
        """First outputs that have not been read; the others are replaced by later ones."""
        self._error: Exception | None = None
        self._news = asyncio.Event()

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
        self._engine.abort(self._unfinished)
        self._engine.forget(self._indices)
        self._unfinished = set()

    async def __aiter__(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        """Yields (index, output) pairs.

        Raises:
            EngineUnavailable: the engine failed or stopped.
            RequestRefused: the engine rejected the request.
            GenerationFailed: the engine could not complete the request.
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

    async def collect(self) -> list[RequestOutput]:
        """Waits for all requests and returns their outputs in the order of the requests."""
        outputs = {index: output async for index, output in self}
        return [outputs[index] for index in range(len(self._indices))]


class AsyncEngine:
    """Runs an engine in a thread of its own and hands its outputs to the event loop.

    `load` creates the engine in that thread. `on_ready` and `on_failure` are called in the event
    loop, at most once each; the second argument of `on_failure` says whether the engine was ready.
    After a failure in loading or in a step, every stream raises `EngineUnavailable`; the engine is
    not restarted.
    """

    def __init__(
        self,
        load: Callable[[], Engine],
        observer: Observer,
        *,
        max_queued: int = 1024,
        on_ready: Callable[[Engine], None] = lambda engine: None,
        on_failure: Callable[[BaseException, bool], None] = lambda error, was_ready: None,
    ):
        self._load = load
        self._observer = observer
        self._max_queued = max_queued
        self._on_ready = on_ready
        self._on_failure = on_failure
        self._mailbox: SimpleQueue[_Message] = SimpleQueue()
        self._streams: dict[str, OutputStream] = {}
        self._deletions: set[asyncio.Future[None]] = set()
        """Deletions of prefixes that the engine thread has not carried out yet."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._engine: Engine | None = None
        self._last_progress = time.monotonic()
        self.state = State.LOADING
        self.failure: BaseException | None = None

    # -- called in the event loop ---------------------------------------------------------------

    def start(self) -> None:
        """Starts to load the engine; must be called in the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def engine(self) -> Engine:
        """The engine, for reading attributes that do not change.

        Raises:
            EngineUnavailable: the engine is still loading, has stopped or has failed.
        """
        if self._engine is None or self.state not in (State.READY, State.DRAINING):
            raise EngineUnavailable(_WHY_NOT.get(self.state, "the engine is loading"))
        return self._engine

    @property
    def is_alive(self) -> bool:
        """Whether the engine thread is running and has not failed."""
        return self._thread.is_alive() and self.state not in (State.FAILED, State.STOPPED)

    @property
    def num_requests(self) -> int:
        """Number of running and waiting requests."""
        return len(self._streams)

    @property
    def seconds_stalled(self) -> float:
        """Seconds since the last step ended, while there are requests; 0 without requests."""
        return time.monotonic() - self._last_progress if self._streams else 0.0

    @property
    def _limit(self) -> int:
        """Maximum number of running and waiting requests."""
        return self.engine.engine_config.max_num_seqs + self._max_queued

    def check_room(self, count: int = 1) -> None:
        """Checks that `count` more requests can be queued.

        Raises:
            EngineUnavailable: the engine does not accept requests in its current state.
            QueueFull: the queue has no room for `count` more requests.
        """
        limit = self._limit
        if self.state is State.DRAINING:
            raise EngineUnavailable(_WHY_NOT[self.state])
        if self.num_requests + count > limit:
            raise QueueFull(
                f"{self.num_requests} requests are running or waiting, and {count} more would "
                f"exceed the limit of {limit}: try again later, or raise --max-num-queued-reqs"
            )

    def submit(self, requests: Sequence[Request]) -> OutputStream:
        """Queues requests, all of them or none. Their ids must be unique.

        Raises:
            EngineUnavailable: the engine does not accept requests in its current state.
            RequestRefused: a request is invalid.
            UnknownPrefix: a request continues a prefix that is not there.
            QueueFull: the queue has no room for all of them.
        """
        engine = self.engine
        try:
            valid = [engine.validate(request) for request in requests]
        except UnknownPrefix:
            raise
        except ValueError as error:
            raise RequestRefused(str(error)) from error
        requests = [each.request for each in valid]
        for request in requests:
            self._check_context(request)
        limit = self._limit
        if len(requests) > limit:
            raise RequestRefused(
                f"the request has {len(requests)} choices, but at most {limit} can be running or "
                "waiting: send fewer prompts, lower n, or raise --max-num-queued-reqs"
            )
        self.check_room(len(requests))
        stream = OutputStream(self, requests)
        if not self._streams:
            self._last_progress = time.monotonic()
        for request in valid:
            self._streams[request.request_id] = stream
            self._mailbox.put(_Add(request))
        self._observer.submitted(requests)
        return stream

    def _check_context(self, request: Request) -> None:
        """Checks that the context holds the tokens that the client asked for, as in vLLM."""
        limit = self.engine.engine_config.max_model_len
        prompt, wanted = len(request.prompt_token_ids), request.sampling_params.max_tokens or 0
        if prompt + wanted > limit:
            raise RequestRefused(
                f"the context of {limit} tokens does not hold {prompt + wanted}: {prompt} of the "
                f"prompt and {wanted} of the output: send a shorter prompt, or set max_tokens to "
                f"at most {limit - prompt}"
            )

    def abort(self, request_ids: Iterable[str]) -> None:
        self._observer.dropped(request_ids)
        for request_id in request_ids:
            self._mailbox.put(_Abort(request_id))

    async def delete_prefix(self, prefix_id: str, owner: str) -> None:
        """Deletes a prefix, see `LLMEngine.delete_prefix`.

        Raises:
            EngineUnavailable: the engine is not ready, or stops before it is done.
            UnknownPrefix: there is none with this id and owner.
        """
        self.engine.prefixes.get(prefix_id, owner)
        done: asyncio.Future[None] = self._loop.create_future()
        self._deletions.add(done)
        done.add_done_callback(self._deletions.discard)
        self._mailbox.put(_DeletePrefix(prefix_id, owner, done))
        await done

    def forget(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._streams.pop(request_id, None)

    def drain(self) -> None:
        """Rejects new requests from now on; running and waiting ones are finished."""
        if self.state is State.READY:
            self.state = State.DRAINING

    def stop(self) -> None:
        """Asks the thread to end after its current step; unfinished requests get an error."""
        self._mailbox.put(_Stop())

    def join(self, timeout_s: float) -> bool:
        """Waits until the thread has ended and returns whether it did so in time."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _loaded(self, engine: Engine, stats: EngineStats) -> None:
        self._engine = engine
        self.state = State.READY
        self._on_ready(engine)
        self._observer.stepped([], stats)

    def _deliver(self, outputs: list[RequestOutput], stats: EngineStats) -> None:
        self._last_progress = time.monotonic()
        self._observer.stepped(outputs, stats)
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None:
                stream.put(output)
                if output.error is not None:
                    stream.fail(GenerationFailed(output.error))
                if output.finished:
                    self.forget([output.request_id])

    def _refuse(self, request_id: str, error: Exception) -> None:
        stream = self._streams.get(request_id)
        if stream is not None:
            stream.fail(error)

    def _fail(self, error: BaseException) -> None:
        was_ready = self.state is not State.LOADING
        self.state, self.failure = State.FAILED, error
        self._fail_all()
        self._on_failure(error, was_ready)

    def _stopped(self) -> None:
        self.state = State.STOPPED
        self._fail_all()

    def _fail_all(self) -> None:
        """Ends every stream with an error that says why the engine is unavailable."""
        streams, self._streams = self._streams, {}
        self._observer.dropped(streams)
        for stream in set(streams.values()):
            stream.fail(EngineUnavailable(_WHY_NOT[self.state]))
        for done in list(self._deletions):
            if not done.done():
                done.set_exception(EngineUnavailable(_WHY_NOT[self.state]))

    # -- called in the engine thread ------------------------------------------------------------

    def _run(self) -> None:
        try:
            engine = self._load()
            self._post(self._loaded, engine, engine.stats())
            with closing(engine):
                self._serve(engine)
        except BaseException as error:  # Every kind of failure must be reported to the clients.
            self._post(self._fail, error)
        else:
            self._post(self._stopped)

    def _serve(self, engine: Engine) -> None:
        while True:
            for message in self._messages(wait=not engine.has_unfinished_requests()):
                if isinstance(message, _Stop):
                    return
                self._apply(engine, message)
            outputs = engine.step() if engine.has_unfinished_requests() else []
            self._post(self._deliver, outputs, engine.stats())

    def _messages(self, *, wait: bool) -> Iterable[_Message]:
        """Yields all messages in the mailbox; `wait` says whether to wait for the first one."""
        try:
            yield self._mailbox.get(block=wait)
            while True:
                yield self._mailbox.get_nowait()
        except Empty:
            return

    def _apply(self, engine: Engine, message: _Add | _Abort | _DeletePrefix) -> None:
        if isinstance(message, _Abort):
            engine.abort_request(message.request_id)
            return
        if isinstance(message, _DeletePrefix):
            error = None
            try:
                engine.delete_prefix(message.prefix_id, message.owner)
            except UnknownPrefix as unknown:
                error = unknown
            self._post(_finish, message.done, error)
            return
        try:
            engine.add_request(message.request)
        except ValueError as error:
            self._post(self._refuse, message.request.request_id, RequestRefused(str(error)))

    def _post(self, function: Callable[..., None], *args: object) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *args)


def _finish(done: "asyncio.Future[None]", error: Exception | None) -> None:
    """Ends a future whose waiter may have gone."""
    if done.done():
        return
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)


_WHY_NOT = {
    State.DRAINING: "the server is shutting down and does not accept new requests",
    State.FAILED: "the engine has failed: see the server's log, and restart the server",
    State.STOPPED: "the server is shutting down",
}
