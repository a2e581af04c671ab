"""The process: listen, load, serve, drain, exit."""

import asyncio
import logging
import os
import signal
import socket
import ssl
import sys
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from fairkv_jax.engine.device_errors import DeviceError
from fairkv_jax.serve.app import create_app
from fairkv_jax.serve.async_engine import AsyncEngine, Engine
from fairkv_jax.serve.metrics import Metrics
from fairkv_jax.serve.options import ServerOptions
from fairkv_jax.serve.service import Service
from fairkv_jax.serve.startup import describe

log = logging.getLogger(__name__)

_FORESEEN = (ValueError, OSError, NotImplementedError, DeviceError)
BACKLOG = 2048
FAILED = 1
ABORTED = 130
FAILURE_GRACE_S = 2.0
"""After a failed step the clients get their errors, and probes their 503, before the exit."""
THREAD_GRACE_S = 5.0
"""A step takes less; loading may take longer, and is not waited for."""


def serve(load: Callable[[], Engine], options: ServerOptions) -> int:
    """Serve until a signal or a failure; returns the exit status.

    SIGTERM and SIGINT let running requests finish within the time-out; a second one aborts.
    """
    _check_certificate(options)
    listener = _listen(options.host, options.port)
    host = f"[{options.host}]" if ":" in options.host else options.host
    scheme = "https" if options.ssl_certfile else "http"
    address = f"{scheme}://{host}:{listener.getsockname()[1]}"

    def on_ready(engine: Engine) -> None:
        metrics.describe(service.model_name, engine.plan)
        for line in describe(engine):
            log.info("%s", line)
        log.info("ready: serving on %s", address)

    def on_failure(error: BaseException, was_ready: bool) -> None:
        # What loading refuses is said in a sentence; a traceback would only hide it.
        foreseen = not was_ready and isinstance(error, _FORESEEN)
        what = "the engine failed" if was_ready else "the engine could not be loaded"
        log.error("%s: %s", what, error, exc_info=None if foreseen else error)
        server.exit_after(FAILURE_GRACE_S if was_ready else 0.0)

    metrics = Metrics()
    engine = AsyncEngine(
        load,
        metrics,
        max_queued=options.max_num_queued_reqs,
        on_ready=on_ready,
        on_failure=on_failure,
    )
    service = Service(engine, options, metrics)
    log.info("listening on %s, loading: /ready answers 503 until it is", address)
    server = _Server(service)
    server.run(sockets=[listener])
    status = FAILED if engine.failure is not None else 0
    if not engine.join(THREAD_GRACE_S):
        log.warning("the engine is in the middle of a step, or loading: it is left behind")
        _exit_now(status)
    log.info("shut down")
    return status


class _Server(uvicorn.Server):
    """uvicorn, which drains before it stops to listen, and with an exit status of our own.

    Left to itself it would refuse connections at the first signal, those of probes too, and end by
    that signal.
    """

    def __init__(self, service: Service):
        options = service.options
        config = uvicorn.Config(
            create_app(service),
            log_config=None,
            log_level=options.log_level,
            access_log=False,  # there is one of our own
            lifespan="on",
            ssl_keyfile=options.ssl_keyfile,
            ssl_certfile=options.ssl_certfile,
        )
        super().__init__(config)
        self._engine = service.engine
        self._shutdown_timeout = options.shutdown_timeout
        self._deadline: float | None = None
        """On the monotonic clock; None while it serves."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        name = signal.Signals(sig).name
        if self._deadline is not None:
            log.warning("%s again: aborting", name)
            _exit_now(ABORTED)
        log.info("%s: finishing the running requests; once more aborts them", name)
        self._deadline = time.monotonic() + self._shutdown_timeout
        self._engine.drain()

    async def on_tick(self, counter: int) -> bool:
        """Every tenth of a second: whether to stop, which then waits until answers are read."""
        if self._deadline is not None:
            left = self._deadline - time.monotonic()
            self.config.timeout_graceful_shutdown = max(1, round(left))
            if left <= 0:
                self._engine.stop()  # which tells who still waits
            self.should_exit = left <= 0 or not self._engine.num_requests
        return await super().on_tick(counter)

    def exit_after(self, seconds: float) -> None:
        self.config.timeout_graceful_shutdown = self._shutdown_timeout
        asyncio.get_running_loop().call_later(seconds, setattr, self, "should_exit", True)


def _check_certificate(options: ServerOptions) -> None:
    """Before anything is loaded.

    Raises:
        SystemExit: the key and the certificate are no pair of PEM files, or one is missing.
    """
    if options.ssl_certfile is None:
        return
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(options.ssl_certfile, options.ssl_keyfile)
    except OSError as error:  # ssl.SSLError is one
        raise SystemExit(
            f"cannot read the certificate {options.ssl_certfile} with the key "
            f"{options.ssl_keyfile} ({error}): give a pair of PEM files by --ssl-certfile and "
            "--ssl-keyfile"
        ) from error


def _listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections from now on; they wait until they are served.

    Raises:
        SystemExit: the address is taken or is none of this machine's.
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
            f"cannot listen on {host}:{port} ({reason}): choose others by --host and --port"
        ) from error
    return listener


def _exit_now(status: int) -> None:
    """Without waiting for the engine's thread, which cannot be interrupted inside of XLA."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
