"""Bounds what clients can hold by sending or reading slowly, or by opening many connections.

    accepted ──► the client sends a request ──► the server answers ──► the client may send another
                 request_read_timeout           response_write_timeout

uvicorn itself only closes connections that stay idle after a response.
"""

import json
import logging
import os
import resource
import time
from asyncio import TimerHandle
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from fairkv_jax.serve.errors import MIN_RETRY_AFTER_S, error_body

log = logging.getLogger(__name__)

_MAX_RESERVED_FILES = 128
"""Maximum number of open files that are reserved for everything but connections."""
_MIN_CONNECTIONS = 8
_MIN_BYTES_READ = 64 << 10
"""Bytes that a client has to read within the write time-out, if there are as many."""
_SECONDS_BETWEEN_WARNINGS = 10.0


@dataclass(frozen=True)
class ConnectionLimits:
    max_connections: int
    read_timeout_s: float
    """Time for a client to send a whole request, from the connection or the last response on."""
    write_timeout_s: float
    """Time for a client to read 64 KiB of a response, or the rest of it."""


class ConnectionGuard:
    """What the connections of a server share."""

    def __init__(self, limits: ConnectionLimits):
        self.limits = limits
        self.waiting: dict[BoundedConnection, None] = {}
        """Connections that wait for their clients to send a request, the longest waiting first."""
        self._last_warning = -_SECONDS_BETWEEN_WARNINGS

    @property
    def protocol(self) -> type[H11Protocol]:
        """The `http` argument of uvicorn's configuration: what makes a connection's protocol."""
        return cast(Any, partial(BoundedConnection, guard=self))

    def make_room(self, newest: "BoundedConnection") -> None:
        """Closes the connection that has waited longest for its client, else the newest one."""
        now = time.monotonic()
        if now - self._last_warning >= _SECONDS_BETWEEN_WARNINGS:
            self._last_warning = now
            log.warning(
                "more than %d connections are open: closing those that wait longest for their "
                "clients, or refusing new ones; see --max-connections and `ulimit -n`",
                self.limits.max_connections,
            )
        next(iter(self.waiting), newest).give_way(
            f"the server has {self.limits.max_connections} connections, its limit: try again "
            "later, or raise --max-connections"
        )


class BoundedConnection(H11Protocol):
    """An HTTP connection whose client must send requests and read responses within the limits.

    If there are too many connections, the one that has waited longest for its client is closed. A
    new one is refused only if all others are being answered.
    """

    def __init__(self, *args: Any, guard: ConnectionGuard, **options: Any):
        super().__init__(*args, **options)
        self.access_log = False  # `AccessLog` replaces it; uvicorn asks whether there are handlers.
        self._guard, self._limits = guard, guard.limits
        self._reading: TimerHandle | None = None
        """The timer of a request that the client has to send."""
        self._writing: TimerHandle | None = None
        """The timer of output that the client has to read."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self._limits.max_connections:
            self._guard.make_room(self)
        self._watch_reading()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_reading()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_reading()
        self._watch_writing()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writing()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_writing_timer()
        self._watch_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_reading_timer()
        self._stop_writing_timer()

    def give_way(self, message: str) -> None:
        """Closes the connection for another one, with an error if the client expects a response.

        If the client has not read its last response, that is lost: it would keep the connection.
        """
        has_unread = self.transport.get_write_buffer_size() > 0
        self.refuse(503, message)
        if has_unread:
            self.transport.abort()

    def refuse(self, status: int, message: str) -> None:
        """Closes the connection, with an error if the client expects a response.

        A client that has sent nothing since the last response expects none.
        """
        has_begun = bool(self.conn.trailing_data[0]) or self.conn.their_state is h11.SEND_BODY
        is_new = self.cycle is None
        if (has_begun or is_new) and self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._send_error(status, message)
        if self.cycle is not None:  # The application must not answer as well.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.connections.discard(self)
        self._stop_reading_timer()
        self.transport.close()
        self._watch_writing()

    def _send_error(self, status: int, message: str) -> None:
        content = json.dumps(error_body(status, message)).encode()
        headers = [
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(content))),
            ("Connection", "close"),
        ]
        if status == 503:
            headers.append(("Retry-After", str(MIN_RETRY_AFTER_S)))
        response = h11.Response(status_code=status, headers=headers)
        for event in (response, h11.Data(data=content), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")

    def _watch_reading(self) -> None:
        """Starts the timer if the server waits for a request, and stops it otherwise."""
        cycle = self.cycle
        is_complete = cycle is not None and not cycle.response_complete and not cycle.more_body
        if is_complete:
            self._stop_reading_timer()
        elif self._reading is None and not self.transport.is_closing():
            self._guard.waiting[self] = None
            self._reading = self.loop.call_later(
                self._limits.read_timeout_s,
                self.refuse,
                408,
                f"the request was not complete after {self._limits.read_timeout_s:g} seconds: "
                "send it faster, or raise --request-read-timeout",
            )

    def _watch_writing(self) -> None:
        """Starts the timer if the server waits until its client has read what is buffered."""
        cycle = self.cycle
        is_complete = cycle is None or cycle.response_complete or self.transport.is_closing()
        must_read = self.flow.write_paused or is_complete
        if must_read and self._writing is None and self.transport.get_write_buffer_size() > 0:
            self._writing = self.loop.call_later(
                self._limits.write_timeout_s,
                self._abort_if_unread,
                cycle,
                self.transport.get_write_buffer_size(),
            )

    def _abort_if_unread(self, cycle: object, num_bytes: int) -> None:
        """Closes the connection, unless its client has read enough of what was buffered.

        One that has sent another request since is given as much time again.
        """
        self._writing = None
        num_left = self.transport.get_write_buffer_size()
        if self.cycle is cycle and num_left > max(0, num_bytes - _MIN_BYTES_READ):
            self.transport.abort()
        else:
            self._watch_writing()

    def _stop_reading_timer(self) -> None:
        self._guard.waiting.pop(self, None)
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _stop_writing_timer(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None


def within_file_limit(max_connections: int, backlog: int) -> tuple[int, int]:
    """Raises this process's limit of open files as far as needed and allowed.

    Returns the numbers of connections and of the backlog that fit, at most those given. asyncio
    accepts up to a backlog of connections before any of them can be closed.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max_connections + backlog + 2 * _MAX_RESERVED_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    free = soft - len(os.listdir("/dev/fd")) - min(_MAX_RESERVED_FILES, soft // 3)
    if soft == resource.RLIM_INFINITY or free >= max_connections + backlog:
        return max_connections, backlog
    backlog = min(backlog, max(1, free // 4))
    fitting = min(max_connections, max(_MIN_CONNECTIONS, free - backlog))
    if fitting < max_connections:
        log.warning(
            "the limit of %d open files (ulimit -n) leaves room for %d connections at a time",
            soft,
            fitting,
        )
    return fitting, backlog
