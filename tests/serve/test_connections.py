"""Clients that send slowly, read slowly, or open more connections than there may be."""

import asyncio
import json
import re
import signal
import socket
import time
from asyncio import Queue
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from fairkv_jax.serve.middleware import MAX_HEADER_BYTES, SizeLimits
from tests.serve.live import PATIENCE_S, Process, Server, eventually, running, without_uvloop
from tests.serve.scripted import ScriptedEngine

SCRIPTED_SERVER = "tests.serve.scripted_server"
COMPLETIONS = "/v1/completions"
HALF_HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
HALF_BODY = HALF_HEAD + b"Content-Length: 100\r\n\r\n{"
LONG = {"prompt": "x", "max_tokens": 400}
SHORT = {"prompt": "x", "max_tokens": 2}
LARGE = {"prompt": ["x" * 400] * 4, "max_tokens": 1, "prompt_logprobs": 20}
"""The answer has more than a megabyte."""
LARGE_STREAM = {**LONG, "prompt": ["x" * 100] * 4, "echo": True, "logprobs": 20, "stream": True}
BUFFER_BYTES = 1 << 14


@pytest.fixture(scope="module")
def slow(checkpoint: Path) -> ScriptedEngine:
    """An engine that takes at least 2 seconds for `LONG`."""
    return ScriptedEngine(checkpoint, step_seconds=0.005)


@pytest.fixture(scope="module")
def bounded(slow: ScriptedEngine) -> Iterator[Server]:
    """A server that closes a connection after a second, in which no more than 40 may be open."""
    with running(
        lambda: slow,
        send_buffer_bytes=BUFFER_BYTES,
        request_read_timeout=1,
        response_write_timeout=1,
        max_connections=40,
    ) as server:
        yield server


def whole(body: dict[str, Any]) -> bytes:
    """A whole request."""
    content = json.dumps(body).encode()
    return HALF_HEAD + f"Content-Length: {len(content)}\r\n\r\n".encode() + content


def connect(server_url: str, content: bytes, receive_bytes: int | None = None) -> socket.socket:
    """A connection that has sent this."""
    host, port = server_url.removeprefix("http://").split(":")
    connection = socket.socket()
    connection.settimeout(PATIENCE_S)
    if receive_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.connect((host, int(port)))
    connection.sendall(content)
    return connection


def everything(connection: socket.socket) -> bytes:
    """What arrives until the server closes the connection."""
    received = b""
    while content := connection.recv(1 << 16):
        received += content
    return received


@pytest.mark.parametrize("content", [b"", HALF_HEAD, HALF_BODY])
def test_a_request_that_is_not_complete_in_time(bounded: Server, content: bytes):
    began = time.monotonic()
    with connect(bounded.url, content) as connection:
        received = everything(connection)
    assert 0.5 < time.monotonic() - began < 10
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408")
    assert "--request-read-timeout" in json.loads(body)["error"]["message"]


@pytest.mark.parametrize("content", [HALF_HEAD, HALF_BODY])
def test_a_request_that_trickles_is_not_complete_in_time_either(bounded: Server, content: bytes):
    began = time.monotonic()
    with connect(bounded.url, content) as connection, suppress(OSError):
        while time.monotonic() - began < PATIENCE_S:
            connection.sendall(b"x")
            time.sleep(0.1)
    assert time.monotonic() - began < 10


def test_a_second_request_that_is_not_complete_in_time(bounded: Server):
    with connect(bounded.url, whole(SHORT)) as connection:
        answer = b""
        while b'"usage"' not in answer:
            answer += connection.recv(1 << 16)
        connection.sendall(HALF_BODY)
        assert everything(connection).startswith(b"HTTP/1.1 408")


def test_an_idle_connection_is_closed_without_an_answer(bounded: Server):
    began = time.monotonic()
    with connect(bounded.url, whole(SHORT)) as connection:
        answer = everything(connection)
    assert time.monotonic() - began < 4, "uvicorn's own time-out has closed it"
    assert answer.count(b"HTTP/1.1 ") == answer.count(b"HTTP/1.1 200") == 1


def test_requests_in_time_are_answered_however_long_that_takes(bounded: Server):
    answer = bounded.client.post(COMPLETIONS, json=LONG)
    assert answer.json()["usage"]["completion_tokens"] == 400


def test_two_hundred_half_sent_requests_keep_nobody_out_and_end(
    bounded: Server, caplog: pytest.LogCaptureFixture
):
    """They are more than there may be connections: those that have waited longest give way."""
    with ExitStack() as stack:
        connections = [
            stack.enter_context(connect(bounded.url, content))
            for content in [HALF_HEAD, HALF_BODY] * 100
        ]
        for path in ("/health", "/ready"):
            assert httpx.get(bounded.url + path, timeout=PATIENCE_S).status_code == 200
        answer = httpx.post(bounded.url + COMPLETIONS, json=SHORT, timeout=PATIENCE_S)
        assert answer.status_code == 200
        for connection in connections:
            with suppress(ConnectionResetError):
                assert everything(connection).startswith((b"HTTP/1.1 408", b"HTTP/1.1 503"))
    assert "--max-connections" in caplog.text


def test_connections_beyond_the_limit_are_refused_if_all_are_answered(checkpoint: Path):
    slow = ScriptedEngine(checkpoint, step_seconds=0.05)
    with running(lambda: slow, max_connections=4) as server, ExitStack() as stack:
        server.client.close()
        for _ in range(4):
            stack.enter_context(connect(server.url, whole(LONG)))
        eventually(lambda: len(slow.requests) == 4)
        response = httpx.get(f"{server.url}/health", timeout=PATIENCE_S)
        assert response.status_code == 503
        assert response.headers["Retry-After"]


def test_a_stream_that_nobody_reads_is_aborted(bounded: Server, slow: ScriptedEngine):
    """Its first chunks alone are longer than the buffers of the sockets and of the server."""
    with connect(bounded.url, whole(LARGE_STREAM), receive_bytes=BUFFER_BYTES) as connection:
        eventually(lambda: bounded.engine.num_requests > 0)
        eventually(lambda: bounded.engine.num_requests == 0, patience_s=5)
        assert b"[DONE]" not in everything(connection)
    eventually(lambda: not slow.requests)
    assert len(slow.aborted) == 4


def test_a_response_that_nobody_reads_is_given_up(bounded: Server):
    with connect(bounded.url, whole(LARGE), receive_bytes=BUFFER_BYTES) as connection:
        eventually(lambda: bounded.engine.num_requests > 0)
        eventually(lambda: bounded.engine.num_requests == 0)
        time.sleep(2)
        assert not is_whole(everything(connection))


def test_a_response_that_is_read_slowly_arrives_whole(bounded: Server):
    """It takes longer than the time-out, in which the client makes progress."""
    with connect(bounded.url, whole(LARGE), receive_bytes=BUFFER_BYTES) as connection:
        received = connection.recv(1 << 14)
        began = time.monotonic()
        while not is_whole(received):
            time.sleep(0.02)
            received += connection.recv(1 << 14)
    assert time.monotonic() - began > 1.5


def is_whole(response: bytes) -> bool:
    head, _, content = response.partition(b"\r\n\r\n")
    return f"content-length: {len(content)}".encode() in head.lower()


def test_headers_have_a_limit(bounded: Server):
    def connect_with_headers(num_bytes: int) -> socket.socket:
        connection = connect(bounded.url, b"GET /version HTTP/1.1\r\nHost: x\r\n")
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with suppress(OSError):  # The server may have closed the connection.
            for _ in range(num_bytes // 4096):
                connection.sendall(b"X-Long: " + b"x" * 4086 + b"\r\n")
                time.sleep(0.005)
        return connection

    with connect_with_headers(MAX_HEADER_BYTES * 3 // 4) as connection:
        connection.sendall(b"Connection: close\r\n\r\n")
        assert everything(connection).startswith(b"HTTP/1.1 200")
    with connect_with_headers(2 * MAX_HEADER_BYTES) as connection, suppress(ConnectionResetError):
        assert everything(connection).startswith(b"HTTP/1.1 400")


def test_headers_have_the_same_limit_if_they_arrive_at_once():
    """uvicorn bounds headers only while they are incomplete."""
    statuses = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        statuses.append(200)

    async def send(message: Message) -> None:
        statuses.append(message.get("status"))

    for num_bytes in (MAX_HEADER_BYTES - 1, MAX_HEADER_BYTES + 1):
        headers = [(b"x", b"x" * (num_bytes // 2)), (b"y", b"y" * (num_bytes - num_bytes // 2 - 2))]
        scope = {"type": "http", "headers": headers}
        asyncio.run(SizeLimits(app, max_bytes=10)(scope, Queue().get, send))
    assert statuses == [200, 431, None]


def test_connections_whose_responses_are_not_read_give_way(checkpoint: Path):
    """They are closed at once, with what they have not read, and not when that times out."""
    quick = ScriptedEngine(checkpoint, step_seconds=0.0)
    bounded = running(lambda: quick, max_connections=4, send_buffer_bytes=BUFFER_BYTES)
    with bounded as server, ExitStack() as stack:
        server.client.close()
        unread = []
        for _ in range(4):
            connection = connect(server.url, whole(LARGE), receive_bytes=BUFFER_BYTES)
            unread.append(stack.enter_context(connection))
            eventually(lambda: server.engine.num_requests > 0)
            eventually(lambda: server.engine.num_requests == 0)
        time.sleep(0.5)  # until the responses are written
        for _ in range(4):
            stack.enter_context(connect(server.url, HALF_HEAD))
        assert httpx.get(f"{server.url}/health", timeout=PATIENCE_S).status_code == 200
        for connection in unread:
            received = b""
            with suppress(ConnectionResetError):
                received = everything(connection)
            assert not is_whole(received)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_health_answers_where_the_system_grants_few_files(
    checkpoint: Path, tmp_path: Path, loop: str
):
    """Each loop has a way of its own to accept many connections at once."""
    if loop == "uvloop":
        pytest.importorskip("uvloop")
    path = without_uvloop(tmp_path) if loop == "asyncio" else ""
    arguments = [str(checkpoint), "0.001"]
    with Process(SCRIPTED_SERVER, arguments, max_files=96, PYTHONPATH=path) as process:
        url = process.wait_ready(PATIENCE_S)
        found = re.search(r"96 open files .* leaves room for (\d+) connections", process.log)
        assert found is not None, process.log
        with ExitStack() as stack:
            for _ in range(150):
                stack.enter_context(connect(url, HALF_HEAD))
            assert httpx.get(f"{url}/health", timeout=PATIENCE_S).status_code == 200
        assert "closing those that wait longest" in process.log
        assert "Traceback" not in process.log
        process.send(signal.SIGTERM)
        assert process.status() == 0
