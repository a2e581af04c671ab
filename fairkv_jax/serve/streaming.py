"""Server-sent events, and noticing that nobody listens any more."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from fairkv_jax.engine.request import RequestOutput
from fairkv_jax.serve.async_engine import OutputStream
from fairkv_jax.serve.errors import ClientGone, error_body, message_of, status_of

log = logging.getLogger(__name__)


class EventStream(StreamingResponse):
    """Sends chunks as server-sent events and closes the output stream, however it ends."""

    def __init__(self, chunks: AsyncGenerator[dict[str, Any], None], outputs: OutputStream):
        super().__init__(_events(chunks), media_type="text/event-stream")
        self.headers["Cache-Control"] = "no-cache"
        self._outputs = outputs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._outputs.close()


async def _events(chunks: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[bytes, None]:
    """An error after the first chunk cannot change the status: it is sent as the last event."""
    try:
        async for chunk in chunks:
            yield _event(chunk)
    except Exception as error:
        if status_of(error) == 500:
            log.exception("a stream failed")
        yield _event(error_body(status_of(error), message_of(error)))
    yield b"data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"


async def collect(request: Request, outputs: OutputStream) -> list[RequestOutput]:
    """The finished outputs, unless the client hangs up first.

    Raises:
        ClientGone: it did; what still ran has been aborted.
    """
    work = asyncio.ensure_future(outputs.collect())
    watch = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientGone("the client hung up")
        return work.result()
    finally:
        work.cancel()
        watch.cancel()
        outputs.close()


async def _disconnected(request: Request) -> None:
    """Once the body has been read, the next thing to receive is the end of the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
