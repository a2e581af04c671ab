"""Runs the server process: listens, loads the engine, serves, drains and exits."""

import asyncio
import logging
import os
import signal
import socket
import ssl
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn, Protocol

import uvicorn

from fairkv_jax.command_line import ABORTED, exit_now
from fairkv_jax.engine.device_errors import DeviceError
from fairkv_jax.serve.admission import QueueLimits
from fairkv_jax.serve.app import create_app
from fairkv_jax.serve.async_engine import AsyncEngine
from fairkv_jax.serve.connections import ConnectionGuard, ConnectionLimits, within_file_limit
from fairkv_jax.serve.engine_protocol import Engine
from fairkv_jax.serve.metrics import Metrics
from fairkv_jax.serve.middleware import MAX_HEADER_BYTES
from fairkv_jax.serve.options import ServerOptions
from fairkv_jax.serve.service import Service
from fairkv_jax.serve.startup import describe

log = logging.getLogger(__name__)

_FORESEEN = (ValueError, OSError, NotImplementedError, DeviceError, MemoryError)
BACKLOG = 2048
FAILED = 1
FAILURE_GRACE_S = 2.0
"""Time between a failed step and the exit, in which clients and probes receive their errors."""
OUT_OF_MEMORY = (
    "the process may not take more memory (ulimit -v, or the limit of its container): raise the "
    "limit, or lower kv_cache_memory_bytes, max_num_seqs or max_model_len"
)
THREAD_GRACE_S = 5.0
"""Maximum time to wait for the engine thread at the exit: longer than a step, not than loading."""


class Group(Protocol):
    """Other processes that run the engine with this one, see `fairkv_jax.hosts`."""

    def call_on_failure(self, on_failure: Callable[[BaseException], None]) -> None: ...
    def fail(self, reason: str) -> None: ...
    def end(self, status: int) -> NoReturn: ...


def serve(load: Callable[[], Engine], options: ServerOptions, group: Group | None = None) -> int:
    """Serves until a signal arrives or the engine fails, and returns the exit status.

    After SIGTERM or SIGINT, running requests may finish until the timeout. A second signal aborts
    them. With a `group`, the process exits here, as soon as the whole group ends.
    """
    end = exit_now if group is None else group.end
    _check_certificate(options)
    listener = _listen(options.host, options.port)
    host = f"[{options.host}]" if ":" in options.host else options.host
    scheme = "https" if options.ssl_certfile else "http"
    address = f"{scheme}://{host}:{listener.getsockname()[1]}"

    def on_ready(engine: Engine) -> None:
        metrics.describe(service.model_name, engine)
        for line in describe(engine):
            log.info("%s", line)
        log.info("ready: serving on %s", address)

    def on_failure(error: BaseException, was_ready: bool) -> None:
        why = OUT_OF_MEMORY if isinstance(error, MemoryError) else error
        # Expected errors, such as invalid options, explain themselves without a traceback.
        foreseen = not was_ready and isinstance(error, _FORESEEN)
        what = "the engine failed" if was_ready else "the engine could not be loaded"
        log.error("%s: %s", what, why, exc_info=None if foreseen else error)
        if group is not None:
            group.fail(f"{what}: {why}")
        server.exit_after(FAILURE_GRACE_S if was_ready else 0.0)

    metrics = Metrics()
    engine = AsyncEngine(
        load,
        metrics,
        queue_limits(options),
        on_ready=on_ready,
        on_failure=on_failure,
    )
    service = Service(engine, options, metrics)
    if group is not None:
        group.call_on_failure(engine.fail)
    log.info("listening on %s, loading the model; /ready returns 503 until it is loaded", address)
    server = _Server(service, end)
    server.run(sockets=[listener])
    status = FAILED if engine.failure is not None else 0
    # A failed group may leave the thread in a step that never ends.
    if not engine.join(THREAD_GRACE_S if group is None or not status else 0):
        log.warning("exiting although the engine thread is still running a step or loading")
        end(status)
    log.info("shut down")
    if group is not None:
        group.end(status)
    return status


def queue_limits(options: ServerOptions) -> QueueLimits:
    return QueueLimits(
        options.max_num_queued_reqs, options.max_num_queued_reqs_per_key, options.max_queue_wait
    )


def http_config(service: Service) -> uvicorn.Config:
    """Returns how uvicorn serves the application."""
    options = service.options
    max_connections, backlog = within_file_limit(options.max_connections, BACKLOG)
    limits = ConnectionLimits(
        max_connections, options.request_read_timeout, options.response_write_timeout
    )
    return uvicorn.Config(
        create_app(service),
        http=ConnectionGuard(limits).protocol,
        ws="none",
        backlog=backlog,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        log_config=None,
        log_level=options.log_level,
        access_log=False,  # `AccessLog` replaces it.
        lifespan="on",
        ssl_keyfile=options.ssl_keyfile,
        ssl_certfile=options.ssl_certfile,
    )


class _Server(uvicorn.Server):
    """A uvicorn server that finishes running requests before it stops to listen.

    uvicorn itself closes its sockets at the first signal, so that probes fail while requests are
    finished, and re-raises the signal at the end.
    """

    def __init__(self, service: Service, end: Callable[[int], NoReturn]):
        options = service.options
        super().__init__(http_config(service))
        self._engine, self._end = service.engine, end
        self._shutdown_timeout = options.shutdown_timeout
        self._deadline: float | None = None
        """End of the shutdown timeout on the monotonic clock; None before the first signal."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        name = signal.Signals(sig).name
        if self._deadline is not None:
            log.warning("received %s again: aborting the running requests", name)
            self._end(ABORTED)
        log.info("received %s: finishing the running requests; a second signal aborts them", name)
        self._deadline = time.monotonic() + self._shutdown_timeout
        self._engine.drain()

    async def on_tick(self, counter: int) -> bool:
        """Returns whether to stop; uvicorn calls it every 0.1 seconds.

        After it returns True, uvicorn waits until open responses have been sent.
        """
        if self._deadline is not None:
            left = self._deadline - time.monotonic()
            self.config.timeout_graceful_shutdown = max(1, round(left))
            if left <= 0:
                self._engine.stop()  # Sends an error to the remaining clients.
            self.should_exit = left <= 0 or not self._engine.num_requests
        return await super().on_tick(counter)

    def exit_after(self, seconds: float) -> None:
        self.config.timeout_graceful_shutdown = self._shutdown_timeout
        asyncio.get_running_loop().call_later(seconds, setattr, self, "should_exit", True)


def _check_certificate(options: ServerOptions) -> None:
    """Checks the key and the certificate, so that errors appear before the model is loaded.

    Raises:
        SystemExit: a file cannot be read, or the key does not belong to the certificate.
    """
    if options.ssl_certfile is None:
        return
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(options.ssl_certfile, options.ssl_keyfile)
    except OSError as error:  # ssl.SSLError is one
        raise SystemExit(
            f"cannot read the certificate {options.ssl_certfile} with the key "
            f"{options.ssl_keyfile} ({error}): set --ssl-certfile and --ssl-keyfile to a matching "
            "pair of PEM files"
        ) from error


def _listen(host: str, port: int) -> socket.socket:
    """Opens a socket that accepts connections at once; they wait until the server has started.

    Raises:
        SystemExit: the address is in use or does not belong to this machine.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        reason = os.strerror(error.errno) if error.errno else error
        raise SystemExit(
            f"cannot listen on {host}:{port} ({reason}): set another --host or --port"
        ) from error
    return listener
