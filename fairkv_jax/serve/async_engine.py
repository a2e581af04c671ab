"""Connects the event loop, which serves the clients, with the thread that runs the engine.

event loop                                  engine thread
submit() ► Admission ── Add ────► mailbox ──► add_request()
OutputStream.close() ── Abort ──►         ──► abort_request()
OutputStream ◄── call_soon_threadsafe ─────── step()
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from enum import Enum
from queue import Empty, SimpleQueue

from fairkv_jax.engine.prefix_registry import UnknownPrefix
from fairkv_jax.engine.request import Request, RequestOutput
from fairkv_jax.engine.stats import EngineStats
from fairkv_jax.serve.admission import Admission, QueueLimits
from fairkv_jax.serve.engine_protocol import Engine, Observer
from fairkv_jax.serve.fair_queue import Group
from fairkv_jax.serve.output_stream import (
    EngineUnavailable,
    GenerationFailed,
    OutputStream,
    QueueFull,
    RequestRefused,
)

log = logging.getLogger(__name__)


class State(Enum):
    """The states of an engine; requests are accepted only in the state `READY`."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    """Accepted requests are finished, and new ones are rejected."""
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True)
class _Add:
    requests: Group
    """They reach the engine in one step, so that they can share a prefill."""


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

_SECONDS_BETWEEN_CHECKS = 1.0
"""Time after which a request that should have expired is looked at again."""


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
        limits: QueueLimits,
        *,
        on_ready: Callable[[Engine], None] = lambda engine: None,
        on_failure: Callable[[BaseException, bool], None] = lambda error, was_ready: None,
    ):
        self._load = load
        self._observer = observer
        self._admission = Admission(limits)
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
            raise EngineUnavailable(_WHY_NOT[self.state])
        return self._engine

    @property
    def num_requests(self) -> int:
        """Number of running and waiting requests."""
        return len(self._streams)

    @property
    def num_http_requests(self) -> int:
        """Number of HTTP requests that run or wait; each may have several choices."""
        return len(set(self._streams.values()))

    @property
    def seconds_stalled(self) -> float:
        """Seconds since the last step ended, while there are requests; 0 without requests."""
        return time.monotonic() - self._last_progress if self._streams else 0.0

    def check_room(self, client: str, count: int = 1) -> None:
        """Checks that `count` more requests of a client can be queued.

        Raises:
            EngineUnavailable: the engine does not accept requests in its current state.
            QueueFull: see `Admission.check_room`.
        """
        if self.state is not State.READY:
            raise EngineUnavailable(_WHY_NOT[self.state])
        self._admission.check_room(client, count)

    def submit(self, requests: Sequence[Request], client: str) -> OutputStream:
        """Queues requests of a client, all of them or none. Their ids must be unique.

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
        self._admission.check_size(len(requests))
        self.check_room(client, len(requests))
        for request_id in self._admission.requests_giving_way(client, len(requests)):
            self._give_up(request_id, "the queue is full, and other clients have less in it")
        stream = OutputStream(requests, self._close)
        if not self._streams:
            self._last_progress = time.monotonic()
        self._streams |= {request.request_id: stream for request in requests}
        self._admission.add(client, valid)
        self._observer.submitted(requests)
        self._release()
        if (seconds := self._admission.limits.max_wait_s) is not None:
            stream.expiry = self._loop.call_later(seconds, self._expire, stream)
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

    def _close(self, stream: OutputStream) -> None:
        """Aborts the requests of a stream that are unfinished."""
        if stream.expiry is not None:
            stream.expiry.cancel()
        request_ids = stream.unfinished_ids
        self._observer.dropped(request_ids)
        for request_id in self._admission.remove(request_ids):
            self._mailbox.put(_Abort(request_id))
        for request_id in stream.request_ids:
            self._streams.pop(request_id, None)
        self._release()

    def _release(self) -> None:
        """Gives the engine what it can start soon."""
        for group in self._admission.release():
            self._mailbox.put(_Add(group))

    def _expire(self, stream: OutputStream) -> None:
        """Ends a stream that has waited for too long without output.

        One whose prompt may be prefilled just now is looked at again later.
        """
        if stream.latest or not stream.unfinished_ids:
            return
        if self._admission.may_have_started(stream.unfinished_ids):
            stream.expiry = self._loop.call_later(_SECONDS_BETWEEN_CHECKS, self._expire, stream)
            return
        self._give_up(
            next(iter(stream.unfinished_ids)),
            f"the request has waited for {self._admission.limits.max_wait_s:g} seconds, the limit "
            "of --max-queue-wait",
        )

    def _give_up(self, request_id: str, why: str) -> None:
        """Ends the stream of a request, if it has not ended yet, and all of its requests."""
        stream = self._streams.get(request_id)
        if stream is not None:
            stream.fail(QueueFull(f"{why}: try again later", self._admission.expected_wait_s))
            self._close(stream)

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

    def drain(self) -> None:
        """Rejects new requests from now on; running and waiting ones are finished."""
        if self.state is State.READY:
            self.state = State.DRAINING

    def stop(self) -> None:
        """Asks the thread to end after its current step; unfinished requests get an error."""
        self._mailbox.put(_Stop())

    def fail(self, error: BaseException) -> None:
        """Ends all streams as after a failed step; any thread may call it."""
        self._post(self._fail, error)

    def join(self, timeout_s: float) -> bool:
        """Waits until the thread has ended and returns whether it did so in time."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _loaded(self, engine: Engine, stats: EngineStats) -> None:
        self._engine = engine
        self._admission.num_rows = engine.engine_config.max_num_seqs
        self.state = State.READY
        self._on_ready(engine)
        self._observer.stepped([], stats)

    def _deliver(self, outputs: list[RequestOutput], stats: EngineStats) -> None:
        self._last_progress = time.monotonic()
        self._observer.stepped(outputs, stats)
        for output in outputs:
            self._admission.advance(output)
            stream = self._streams.get(output.request_id)
            if stream is not None:
                stream.put(output)
                if output.error is not None:
                    stream.fail(GenerationFailed(output.error))
                if output.finished:
                    del self._streams[output.request_id]
        self._release()

    def _refuse(self, request_id: str, error: Exception) -> None:
        self._admission.remove({request_id})
        stream = self._streams.get(request_id)
        if stream is not None:
            stream.fail(error)
        self._release()

    def _fail(self, error: BaseException) -> None:
        if self.failure is not None:
            return
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
        self._admission.clear()
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
        for request in message.requests:
            try:
                engine.add_request(request)
            except ValueError as error:
                self._post(self._refuse, request.request_id, RequestRefused(str(error)))

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
    State.LOADING: "the engine is loading",
    State.DRAINING: "the server is shutting down and does not accept new requests",
    State.FAILED: "the engine has failed: see the server's log, and restart the server",
    State.STOPPED: "the server is shutting down",
}
