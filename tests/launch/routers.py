"""Starts the routers of launch/router/ as their files say."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.serve.live import PATIENCE_S, ROOT

ROUTER_FILES = ROOT / "launch" / "router"
INSTALL_S = 300.0


@dataclass
class Router:
    """A router that runs."""

    name: str
    url: str
    process: subprocess.Popen
    log_file: Path

    def is_up(self) -> bool:
        """Whether it serves a request; it must not have ended."""
        assert self.process.poll() is None, self.log_file.read_text(encoding="utf-8")[-2000:]
        body = {"model": "tiny", "prompt": "x", "max_tokens": 1}
        try:
            answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=PATIENCE_S)
        except httpx.TransportError:
            return False
        return answer.status_code == 200


class NotInstalled(Exception):
    """A router that this machine does not have; the text says why."""


def program(name: str) -> str:
    """Returns the path of a program; those of daemons are not on every user's PATH.

    Raises:
        NotInstalled: there is no such program.
    """
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if found is None:
        raise NotInstalled(f"{name} is not installed (apt-get install {name})")
    return found


@contextmanager
def haproxy(port: int, replicas: Sequence[str], folder: Path) -> Iterator[Router]:
    """The addresses come from the environment, as the file allows."""
    addresses = {f"REPLICA_{i}": address for i, address in enumerate(replicas, start=1)}
    command = [program("haproxy"), "-f", str(ROUTER_FILES / "haproxy.cfg")]
    addresses["LISTEN"] = f"127.0.0.1:{port}"
    with _process(port, command, folder / "haproxy.log", **addresses) as router:
        yield router


@contextmanager
def nginx(port: int, replicas: Sequence[str], folder: Path) -> Iterator[Router]:
    """nginx reads no environment, so the addresses in its file are replaced."""
    text = (ROUTER_FILES / "nginx.conf").read_text(encoding="utf-8")
    for i, address in enumerate(replicas, start=1):
        text = _replaced(text, f"10.0.0.{i}:8000", address)
    file = folder / "nginx.conf"
    file.write_text(_replaced(text, "127.0.0.1:8080", f"127.0.0.1:{port}"), encoding="utf-8")
    command = [program("nginx"), "-c", str(file), "-e", str(folder / "nginx-errors.log")]
    command += ["-g", f"daemon off; pid {folder}/nginx.pid;"]
    with _process(port, command, folder / "nginx.log") as router:
        yield router


@contextmanager
def sglang_router(port: int, replicas: Sequence[str], folder: Path) -> Iterator[Router]:
    with _python_router("sglang-router", port, replicas, folder) as router:
        yield router


@contextmanager
def vllm_router(port: int, replicas: Sequence[str], folder: Path) -> Iterator[Router]:
    with _python_router("vllm-router", port, replicas, folder) as router:
        yield router


ROUTERS: dict[str, Callable] = {
    "haproxy": haproxy,
    "nginx": nginx,
    "sglang-router": sglang_router,
    "vllm-router": vllm_router,
}
"""By name: a router that listens on a port of 127.0.0.1, in front of replicas at addresses."""


def free_port() -> int:
    """A port of 127.0.0.1 on which nothing listens now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextmanager
def _python_router(name: str, port: int, replicas: Sequence[str], folder: Path) -> Iterator[Router]:
    """Runs a script in an environment that has the package which its comment asks for."""
    script = ROUTER_FILES / f"{name}.sh"
    asked = re.search(r"pip install '(.+)'", script.read_text(encoding="utf-8"))
    assert asked is not None
    run = [sys.executable, "-m", "uv", "run", "--no-project", "--quiet"]
    run += ["--python", sys.executable, "--with", asked[1]]
    try:
        subprocess.run([*run, "true"], capture_output=True, check=True, timeout=INSTALL_S)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise NotInstalled(f"{asked[1]} cannot be installed: {error.stderr!r}") from error
    urls = [f"http://{address}" for address in replicas]
    settings = {"PORT": str(port), "PROMETHEUS_PORT": str(free_port())}
    command = [*run, "bash", str(script), *urls]
    with _process(port, command, folder / f"{name}.log", **settings) as router:
        yield router


@contextmanager
def _process(port: int, command: Sequence[str], log: Path, **environment: str) -> Iterator[Router]:
    """A router with all of its processes, which end with the block."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        try:
            yield Router(log.stem, f"http://127.0.0.1:{port}", process, log)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(PATIENCE_S)


def _replaced(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, f"{old} is there {text.count(old)} times"
    return text.replace(old, new)
