"""What is checked before a body is read: its length, the key, and whether there is room.

Plain ASGI, as Starlette's BaseHTTPMiddleware hides from handlers that a client hung up.
"""

import secrets
from collections.abc import Sequence
from hashlib import sha256

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fairkv_jax.serve.async_engine import AsyncEngine, EngineUnavailable, QueueFull
from fairkv_jax.serve.errors import ApiError, error_response

GUARDED_PREFIXES = ("/v1/", "/tokenize", "/detokenize")

GENERATING = ("/v1/completions", "/v1/chat/completions")


class Room:
    """Answers 503 at once where not one request more could be queued.

    A server in that state is asked most often: it should not read, parse and tokenise in vain.
    """

    def __init__(self, app: ASGIApp, engine: AsyncEngine):
        self.app = app
        self.engine = engine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in GENERATING:
            try:
                self.engine.check_room()
            except (EngineUnavailable, QueueFull) as error:
                await error_response(503, str(error))(scope, receive, send)
                return
        await self.app(scope, receive, send)


class BodyLimit:
    """Answers 413 to a body that is, or turns out to be, longer than the limit."""

    def __init__(self, app: ASGIApp, max_bytes: int):
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        message = f"the body exceeds {self.max_bytes} bytes, the limit of --max-request-bytes"
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
    """Answers 401 where a key is needed and `Authorization: Bearer KEY` has none of them."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]):
        self.app = app
        self.digests = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(GUARDED_PREFIXES):
            scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not self._known(key.strip()):
                refusal = error_response(401, "send a valid key: 'Authorization: Bearer KEY'")
                refusal.headers["WWW-Authenticate"] = "Bearer"
                await refusal(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _known(self, given: str) -> bool:
        """Compares with every key, and every byte: the time taken tells nothing, nor the length."""
        digest = _digest(given)
        return sum(secrets.compare_digest(digest, known) for known in self.digests) > 0


def _digest(key: str) -> bytes:
    return sha256(key.encode()).digest()
