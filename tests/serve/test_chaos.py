"""Clients that do everything wrong, for a while: the server answers, and keeps nothing of them.

The short form runs for some seconds, with a scripted engine. The long form has a real one and runs
for 20 minutes, or for `CHAOS_SECONDS`, an environment variable.
"""

import asyncio
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import time
from asyncio import StreamReader, StreamWriter
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.serve.live import PATIENCE_S, Process, eventually, own_devices, without_uvloop

NUM_CLIENTS = 64
SHORT_SECONDS = 10.0
LONG_SECONDS = float(os.environ.get("CHAOS_SECONDS", "1200"))
CLIENT = """
import sys, httpx
while True:
    body = {"prompt": "x", "max_tokens": 60, "stream": True}
    try:
        with httpx.stream("POST", sys.argv[1] + "/v1/completions", json=body, timeout=60) as answer:
            for line in answer.iter_lines(): pass
    except httpx.HTTPError:
        pass
"""
"""A client in a process of its own, which is stopped and continued."""
EXPECTED = {200, 400, 404, 405, 408, 413, 503}
FLAGS = (
    "--request-read-timeout=2",
    "--response-write-timeout=2",
    "--max-queue-wait=5",
    "--max-num-queued-reqs=100",
    "--max-connections=200",
    "--max-request-bytes=100000",
)


class Chaos:
    """Random requests to a server, and what came back."""

    def __init__(self, url: str, seed: int):
        self.url, self.chance = url, random.Random(seed)
        host, port = url.removeprefix("http://").split(":")
        self.address = host, int(port)
        self.statuses: Counter[int] = Counter()
        self.wrong: list[str] = []
        self._acts = [
            self._ask,
            self._ask,
            self._leave,
            self._reset,
            self._half_close,
            self._read_slowly,
            self._send_nonsense,
            self._send_half,
            self._scrape,
        ]

    async def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        await asyncio.gather(*(self._client(end) for _ in range(NUM_CLIENTS)))

    async def _client(self, end: float) -> None:
        while time.monotonic() < end:
            act = self.chance.choice(self._acts)
            try:
                reader, writer = await asyncio.open_connection(*self.address, limit=1 << 12)
                try:
                    await asyncio.wait_for(act(reader, writer), PATIENCE_S)
                finally:
                    writer.close()
            except TimeoutError:
                self.wrong.append(f"{act.__name__} has not ended")
            except OSError:
                pass  # The server may close the connection at any time.
            await asyncio.sleep(self.chance.random() * 0.05)

    def _request(self, content: bytes | None = None, path: str = "/v1/completions") -> bytes:
        if content is None:
            body = {
                "prompt": "x" * self.chance.randrange(1, 50),
                "max_tokens": self.chance.randrange(1, 60),
                "n": self.chance.choice([1, 1, 1, 4]),
                "stream": self.chance.random() < 0.5,
            }
            if self.chance.random() < 0.1:
                body["guided_regex"] = f"[a-z]{{{self.chance.randrange(1, 50)}}}"
            content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        head += f"Connection: close\r\nContent-Length: {len(content)}\r\n\r\n"
        return head.encode() + content

    async def _take(
        self, reader: StreamReader, *, slowly: bool = False, may_be_cut: bool = False
    ) -> None:
        """Reads an answer until its end and checks its status."""
        answer = b""
        while part := await reader.read(256 if slowly else 1 << 16):
            answer += part
            if slowly:
                await asyncio.sleep(0.01)
        if not answer:
            if not may_be_cut:
                self.wrong.append("closed without an answer")
            return
        status = int(answer.split(b" ", 2)[1])
        self.statuses[status] += 1
        has_hint = b"retry-after:" in answer.lower()
        is_whole = may_be_cut or b"[DONE]" in answer or b"text/event-stream" not in answer
        if status not in EXPECTED or (status == 503 and not has_hint) or not is_whole:
            self.wrong.append(answer[:1000].decode(errors="replace"))

    async def _ask(self, reader: StreamReader, writer: StreamWriter) -> None:
        writer.write(self._request())
        await self._take(reader)

    async def _leave(self, reader: StreamReader, writer: StreamWriter) -> None:
        writer.write(self._request())
        await writer.drain()
        await asyncio.sleep(self.chance.random() * 0.1)

    async def _reset(self, reader: StreamReader, writer: StreamWriter) -> None:
        await self._leave(reader, writer)
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    async def _half_close(self, reader: StreamReader, writer: StreamWriter) -> None:
        """A client that sends no more counts as one that has gone."""
        writer.write(self._request())
        writer.write_eof()
        await self._take(reader, may_be_cut=True)

    async def _read_slowly(self, reader: StreamReader, writer: StreamWriter) -> None:
        writer.write(self._request())
        await self._take(reader, slowly=True)

    async def _send_nonsense(self, reader: StreamReader, writer: StreamWriter) -> None:
        contents = [b"{", b"\xff\xfe", b"[]", b'{"prompt": NaN}', b"{" * 5000, b'{"prompt": 5}']
        paths = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/nowhere", "/health"]
        contents.append(b'{"prompt": "' + b"x" * 200_000 + b'"}')
        content, path = self.chance.choice(contents), self.chance.choice(paths)
        writer.write(self._request(content, path))
        await self._take(reader)

    async def _send_half(self, reader: StreamReader, writer: StreamWriter) -> None:
        request = self._request()
        writer.write(request[: self.chance.randrange(len(request))])
        await self._take(reader)

    async def _scrape(self, reader: StreamReader, writer: StreamWriter) -> None:
        path = self.chance.choice(["/metrics", "/health", "/stats", "/plan", "/v1/models"])
        writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        await self._take(reader)


@dataclass(frozen=True)
class Held:
    """What a process holds."""

    files: int
    threads: int
    kilobytes: int

    @classmethod
    def by(cls, pid: int) -> "Held":
        status = Path(f"/proc/{pid}/status").read_text()
        numbers = dict(line.split(":", 1) for line in status.splitlines())
        files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        return cls(files, int(numbers["Threads"]), int(numbers["VmRSS"].split()[0]))


@contextmanager
def stopped_clients(url: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    clients = [subprocess.Popen([sys.executable, "-c", CLIENT, url]) for _ in range(2)]
    try:
        yield clients
    finally:
        for client in clients:
            client.kill()
            client.wait()


async def chaos_with_stopped_clients(
    chaos: Chaos, clients: list[subprocess.Popen[bytes]], seconds: float
) -> None:
    """Meanwhile, the clients in processes of their own are stopped and continued."""
    running = asyncio.create_task(chaos.run(seconds))
    while not running.done():
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for client in clients:
                client.send_signal(number)
            await asyncio.sleep(0.5)
    await running


def gauge(text: str, name: str) -> float:
    (line,) = (line for line in text.splitlines() if line.startswith(f"{name}{{"))
    return float(line.rsplit(" ", 1)[1])


def run_chaos(process: Process, url: str, seconds: float, *, max_growth: float) -> None:
    """Runs it twice for half of the time; in the second half nothing may grow."""
    files_before = Held.by(process.pid).files
    held = []
    with stopped_clients(url) as clients:
        for seed in range(2):
            chaos = Chaos(url, seed)
            asyncio.run(chaos_with_stopped_clients(chaos, clients, seconds / 2))
            assert not chaos.wrong, (len(chaos.wrong), chaos.wrong[:3])
            assert chaos.statuses[200] > 50, chaos.statuses
            assert chaos.statuses[400] > 5, chaos.statuses
            eventually(lambda: Held.by(process.pid).files < files_before + 20)
            held.append(Held.by(process.pid))
            print(chaos.statuses, held[-1])
    with httpx.Client(base_url=url, timeout=PATIENCE_S) as client:
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
            eventually(lambda name=name: gauge(client.get("/metrics").text, f"vllm:{name}") == 0)
        assert client.get("/health").status_code == 200
    half, whole = held
    assert abs(whole.files - half.files) <= 8
    assert whole.threads <= half.threads + 8  # an executor's threads are made when needed
    assert whole.kilobytes <= half.kilobytes * (1 + max_growth)
    _, found, traceback = process.log.partition("Traceback")
    assert not found, traceback[:4000]
    process.send(signal.SIGTERM)
    assert process.status() == 0


def test_some_seconds_of_chaos(checkpoint: Path, tmp_path: Path):
    arguments = [str(checkpoint), "0.002", *FLAGS]
    path = without_uvloop(tmp_path)
    with Process("tests.serve.scripted_server", arguments, PYTHONPATH=path) as process:
        run_chaos(process, process.wait_ready(PATIENCE_S), SHORT_SECONDS, max_growth=0.3)


@pytest.mark.long
def test_minutes_of_chaos(checkpoint: Path, tmp_path: Path):
    arguments = [f"--model={checkpoint}", "--port=0", "--max-model-len=128", "--max-num-seqs=8"]
    arguments += FLAGS
    path = without_uvloop(tmp_path)
    with Process("fairkv_jax.serve", arguments, PYTHONPATH=path, **own_devices()) as process:
        max_growth = 0.01 if LONG_SECONDS >= 1200 else 0.05
        run_chaos(process, process.wait_ready(400.0), LONG_SECONDS, max_growth=max_growth)
