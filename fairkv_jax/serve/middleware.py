"""Middleware that checks requests before their bodies are read: size, API key and queue.

The middleware is plain ASGI, because Starlette's BaseHTTPMiddleware hides from the handlers that a
client has disconnected.
"""

import secrets
from collections.abc import Sequence
from contextlib import suppress
from hashlib import sha256
from ipaddress import IPv6Address, ip_address, ip_network

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fairkv_jax.serve.async_engine import AsyncEngine
from fairkv_jax.serve.errors import ApiError, error_response, status_of
from fairkv_jax.serve.output_stream import EngineUnavailable, QueueFull

GUARDED_PREFIXES = ("/v1/", "/tokenize", "/detokenize")
MONITORING_PREFIXES = ("/load", "/metrics", "/stats", "/plan", "/docs", "/redoc", "/openapi.json")
"""They tell of the load and of the model, and need a key unless --open-metrics is given."""

MAX_HEADER_BYTES = 64 << 10

GENERATING = ("/v1/completions", "/v1/chat/completions", "/v1/prefixes")


class Room:
    """Responds with 503 if the queue is full or the engine does not accept requests, and with 429
    if the client has too many requests in the queue.

    An overloaded server thus does not spend time on reading and tokenizing requests in vain.
    """

    def __init__(self, app: ASGIApp, engine: AsyncEngine, has_keys: bool):
        self.app = app
        self.engine = engine
        self.has_keys = has_keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in GENERATING:
            try:
                self.engine.check_room(client_name(scope, has_keys=self.has_keys))
            except (EngineUnavailable, QueueFull) as error:
                wait = getattr(error, "retry_after_s", 0.0)
                response = error_response(status_of(error), str(error), retry_after_s=wait)
                await response(scope, receive, send)
                return
        await self.app(scope, receive, send)


class SizeLimits:
    """Responds with 413 if the body is too long, declared or received, and with 431 if the headers
    are: uvicorn limits headers only while they are incomplete.
    """

    def __init__(self, app: ASGIApp, max_bytes: int):
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
            message = f"the headers exceed {MAX_HEADER_BYTES} bytes: send less"
            await error_response(431, message)(scope, receive, send)
            return
        message = (
            f"the body exceeds {self.max_bytes} bytes: send less, or raise --max-request-bytes"
        )
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdecimal() and int(declared) > self.max_bytes:
            await error_response(413, message)(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            event = await receive()
            received += len(event.get("body", b""))
            if received > self.max_bytes:
                raise ApiError(413, message)
            return event

        await self.app(scope, counted, send)


class ApiKeys:
    """Responds with 401 if a guarded path is requested without one of the API keys."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], open_metrics: bool):
        self.app = app
        self.guarded = GUARDED_PREFIXES + (() if open_metrics else MONITORING_PREFIXES)
        self.digests = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_guarded = scope["type"] == "http" and scope["path"].startswith(self.guarded)
        if is_guarded and not self._known(Headers(scope=scope)):
            refusal = error_response(
                401, "the API key is missing or invalid: send 'Authorization: Bearer KEY'"
            )
            refusal.headers["WWW-Authenticate"] = "Bearer"
            await refusal(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _known(self, headers: Headers) -> bool:
        """Compares with every key in constant time, so that timing reveals nothing of the keys."""
        digest = key_digest(headers)
        return (
            digest is not None
            and sum(secrets.compare_digest(digest, known) for known in self.digests) > 0
        )


def client_name(scope: Scope, *, has_keys: bool) -> str:
    """Returns who sends a request: its API key's hash if there are keys, else its address."""
    digest = key_digest(Headers(scope=scope)) if has_keys else None
    if digest is not None:
        return digest.hex()
    address = scope.get("client")
    return _network(address[0]) if address else ""


def _network(address: str) -> str:
    """Returns the address, or of an IPv6 address its first 64 bits: that many a host may have."""
    with suppress(ValueError):
        parsed = ip_address(address)
        if isinstance(parsed, IPv6Address) and parsed.ipv4_mapped is None:
            return str(ip_network((parsed, 64), strict=False))
    return address


def key_digest(headers: Headers) -> bytes | None:
    """Returns the hash of the API key in the headers; None without one."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return _digest(key.strip()) if scheme.lower() == "bearer" else None


def _digest(key: str) -> bytes:
    return sha256(key.encode()).digest()
