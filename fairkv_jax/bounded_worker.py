"""Runs code on untrusted input in child processes, within limits of time, memory and output.

    parent: pool.call(value) ── JSON ──► child: function(value) ── JSON ──► result or error
            └── time-out, cancellation: the child is killed, and another one is started

Grammars and chat templates can take any amount of time and memory, and a thread that compiles or
renders them cannot be interrupted. A child can. It is started once and serves many calls, so that
an ordinary call costs well under a millisecond more than in the parent.

The child has none of the parent's open files, and of its environment only what Python needs. A
child also ends itself when the parent has gone.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "PYTHONHOME", "LANG", "LC_ALL", "TZ")
"""Environment variables that a child inherits; API keys are not among them."""
_NICENESS = 10
"""Children leave the processors to the engine if both want them."""
_START_SECONDS = 60.0
_POLL_SECONDS = 0.05
"""How soon a cancellation is noticed."""
_RETIRED_FRACTION = 0.25
"""A child whose memory has grown by more than this fraction of its limit is replaced."""


@dataclass(frozen=True)
class WorkerLimits:
    """The limits of one call."""

    timeout_s: float
    memory_bytes: int
    """Memory in addition to what the child takes before its first call."""
    output_bytes: int = 1 << 20
    """Bytes of the result in JSON."""


class LimitExceeded(Exception):
    """A call met one of its limits."""

    def __init__(self, limit: str):
        super().__init__(limit)
        self.limit = limit
        """"time", "memory" or "output"."""


class CallCancelled(Exception):
    """The call was cancelled."""


class WorkerPool:
    """Child processes that each run one function, one call at a time.

    `target` is "module:name". In every child, `name(setup)` is called once and returns the
    function, which takes and returns JSON values. Children are started when they are needed. Any
    thread may call; calls beyond the number of workers wait.
    """

    def __init__(self, target: str, setup: Any, limits: WorkerLimits, *, num_workers: int = 1):
        self._target, self._setup, self._limits = target, json.dumps(setup).encode(), limits
        self._free = threading.Semaphore(num_workers)
        self._idle: list[_Worker] = []
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _stop_all, self._idle)

    def warm_up(self) -> None:
        """Starts one child without waiting for it, unless there is an idle one."""
        with self._lock:
            if not self._idle:
                self._idle.append(self._start())

    def call(self, value: Any, cancelled: threading.Event | None = None) -> Any:
        """Runs the function in a child and returns its result.

        Raises:
            ValueError: the function raised it.
            LimitExceeded: the call met a limit.
            CallCancelled: `cancelled` was set before the end of the call.
            RuntimeError: the function failed otherwise, or no child could be started.
        """
        message = json.dumps(value, default=_as_json).encode()
        while not self._free.acquire(timeout=_POLL_SECONDS):
            _check(cancelled)
        try:
            return self._run(message, cancelled)
        finally:
            self._free.release()

    def close(self) -> None:
        """Ends all children; there must be no running calls."""
        self._finalizer()

    def _run(self, message: bytes, cancelled: threading.Event | None) -> Any:
        with self._lock:
            worker = self._idle.pop() if self._idle else self._start()
        try:
            answer = worker.ask(message, self._limits.timeout_s, cancelled)
        except BaseException:
            worker.stop()
            self.warm_up()  # The next call should not have to wait for a new child.
            raise
        if answer.get("retires"):
            worker.stop()
            self.warm_up()
        else:
            with self._lock:
                self._idle.append(worker)
        if "refused" in answer:
            raise ValueError(answer["refused"])
        if "exceeded" in answer:
            raise LimitExceeded(answer["exceeded"])
        if "failed" in answer:
            raise RuntimeError(f"a worker of {self._target} failed: {answer['failed']}")
        return answer["result"]

    def _start(self) -> "_Worker":
        return _Worker(self._target, self._setup, self._limits)


class _Worker:
    """One child process."""

    def __init__(self, target: str, setup: bytes, limits: WorkerLimits):
        self._connection, theirs = Pipe()
        root = str(Path(__file__).resolve().parents[1])
        given = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        arguments = [str(theirs.fileno()), target, json.dumps(asdict(limits))]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fairkv_jax.bounded_worker", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for the parent.
                env={**given, "PYTHONPATH": path, "MALLOC_ARENA_MAX": "1"},
            )
        finally:
            theirs.close()
        self._connection.send_bytes(setup)
        self._is_ready = False

    def ask(
        self, message: bytes, timeout_s: float, cancelled: threading.Event | None
    ) -> dict[str, Any]:
        """Sends one call and waits for its answer; raises as `WorkerPool.call`."""
        if not self._is_ready:
            try:
                self._receive(_START_SECONDS, cancelled)
            except LimitExceeded as error:
                raise RuntimeError("a worker process could not be started") from error
            self._is_ready = True
        try:
            self._connection.send_bytes(message)
        except OSError as error:
            raise RuntimeError("a worker process has died") from error
        return self._receive(timeout_s, cancelled)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._connection.close()

    def _receive(self, timeout_s: float, cancelled: threading.Event | None) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        while not self._connection.poll(min(_POLL_SECONDS, timeout_s)):
            _check(cancelled)
            if time.monotonic() > deadline:
                raise LimitExceeded("time")
        try:
            return json.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            # The child's own timer ends it shortly after its time; otherwise, programs that are
            # not Python end the process when an allocation fails.
            is_late = self._process.wait() == -signal.SIGALRM
            raise LimitExceeded("time" if is_late else "memory") from None


def _stop_all(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().stop()


def _check(cancelled: threading.Event | None) -> None:
    if cancelled is not None and cancelled.is_set():
        raise CallCancelled


def _as_json(value: Any) -> Any:
    """Mappings and sequences of other types than JSON's; everything else is refused."""
    try:
        return dict(value) if hasattr(value, "keys") else list(value)
    except TypeError:
        raise ValueError(f"{value!r} cannot be represented in JSON") from None


# -- in the child -----------------------------------------------------------------------------


def memory_in_use() -> tuple[int, int]:
    """Returns the bytes of this process's address space and those that are resident."""
    pages = Path("/proc/self/statm").read_text().split()
    size = resource.getpagesize()
    return int(pages[0]) * size, int(pages[1]) * size


def _main(file_number: str, target: str, limits_json: str) -> None:
    connection, limits = Connection(int(file_number)), WorkerLimits(**json.loads(limits_json))
    module, _, name = target.partition(":")
    function = getattr(import_module(module), name)(json.loads(connection.recv_bytes()))
    os.nice(_NICENESS)
    reserved, resident = memory_in_use()
    most = reserved + limits.memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection.send_bytes(b"{}")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # Rust reports failed allocations to stderr.
    while True:
        try:
            value = json.loads(connection.recv_bytes())
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, limits.timeout_s + 1)
        answer = _answer(function, value)
        content = json.dumps(answer).encode()
        signal.setitimer(signal.ITIMER_REAL, 0)
        if len(content) > limits.output_bytes:
            answer, content = {"exceeded": "output"}, b""
        grown = memory_in_use()[1] - resident
        if not content or grown > _RETIRED_FRACTION * limits.memory_bytes:
            content = json.dumps({**answer, "retires": True}).encode()
        connection.send_bytes(content)


def _answer(function: Callable[[Any], Any], value: Any) -> dict[str, Any]:
    try:
        return {"result": function(value)}
    except MemoryError:
        return {"exceeded": "memory", "retires": True}
    except ValueError as error:
        return {"refused": str(error)}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    _main(*sys.argv[1:])
