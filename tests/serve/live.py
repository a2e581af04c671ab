"""Servers for tests: in a thread, where the test sees the engine, or as a process of its own."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from fairkv_jax.serve.async_engine import AsyncEngine
from fairkv_jax.serve.engine_protocol import Engine
from fairkv_jax.serve.metrics import Metrics
from fairkv_jax.serve.options import ServerOptions
from fairkv_jax.serve.server import http_config, queue_limits
from fairkv_jax.serve.service import Service

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60.0
"""Waits end early: this is for machines that are busy with something else."""


@dataclass
class Server:
    url: str
    client: httpx.Client
    engine: AsyncEngine


def eventually(condition: Callable[[], object], patience_s: float = PATIENCE_S) -> None:
    """Wait for a condition that another thread or process brings about."""
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


@contextmanager
def running(
    load: Callable[[], Engine],
    *,
    wait: bool = True,
    send_buffer_bytes: int | None = None,
    **options,
) -> Iterator[Server]:
    """A server in a thread, ready unless `wait` is false.

    `send_buffer_bytes` is what the system buffers of a response; by default it is megabytes.
    """
    settings = ServerOptions(**options)
    metrics = Metrics()
    engine = AsyncEngine(
        load,
        metrics,
        queue_limits(settings),
        on_ready=lambda engine: metrics.describe(engine.model_name, engine),
    )
    config = http_config(Service(engine, settings, metrics))
    listener = socket.create_server(("127.0.0.1", 0))
    if send_buffer_bytes is not None:  # The sockets that it accepts inherit this.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    config.timeout_graceful_shutdown = 1
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        with httpx.Client(base_url=url, timeout=PATIENCE_S) as client:
            eventually(lambda: server.started)
            if wait:
                eventually(lambda: client.get("/ready").status_code == 200)
            yield Server(url, client, engine)
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
        assert engine.join(PATIENCE_S)


@contextmanager
def posted(
    url: str, path: str, body: dict[str, Any], headers: Mapping[str, str] | None = None
) -> Iterator[socket.socket]:
    """A bare connection that has sent a request; leaving it hangs up."""
    content = json.dumps(body).encode()
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        yield connection


def own_devices() -> dict[str, Any]:
    """The environment of a process that makes as many CPU devices as its options say."""
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
    return {"XLA_FLAGS": flags.strip()}


def without_uvloop(folder: Path) -> str:
    """A PYTHONPATH with which a server runs on asyncio's own loop, as it does for most users."""
    (folder / "uvloop.py").write_text("raise ImportError")
    return str(folder)


class Process:
    """A server in a process of its own; what it logs is kept."""

    def __init__(
        self,
        module: str,
        arguments: Sequence[str] = (),
        *,
        python: str = sys.executable,
        folder: Path = ROOT,
        max_files: int | None = None,
        wrapper: Sequence[str] = (),
        **environment: str,
    ):
        """It runs in `folder`; `max_files` limits the files that it may have open.

        `wrapper` is a command that runs the command behind it.
        """
        self.lines: list[str] = []
        command = [*wrapper, python, "-m", module, *arguments]
        if max_files is not None:
            command = ["bash", "-c", f'ulimit -n {max_files}; exec "$@"', "bash", *command]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=folder,
            env={**os.environ, **environment},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        assert self._process.stdout is not None
        self._process.stdout.close()

    @property
    def log(self) -> str:
        return "".join(self.lines)

    @property
    def pid(self) -> int:
        return self._process.pid

    def address(self, patience_s: float = PATIENCE_S) -> str:
        """Where it listens; it may not be ready yet."""
        eventually(lambda: self._said(r"listening on (https?://\S+?),"), patience_s)
        return self._said(r"listening on (https?://\S+?),")

    def wait_ready(self, patience_s: float) -> str:
        ready = r"ready: serving on (https?://\S+)"
        eventually(lambda: self._said(ready) or self.ended, patience_s)
        assert not self.ended, self.log
        return self._said(ready)

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def status(self, patience_s: float = PATIENCE_S) -> int:
        """The exit status, for which it waits."""
        status = self._process.wait(patience_s)
        self._reader.join(PATIENCE_S)
        return status

    def _said(self, pattern: str) -> str:
        found = re.search(pattern, self.log)
        return found.group(1) if found else ""

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(line)
