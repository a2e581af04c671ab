"""Parts that completions and chat completions share: usage and event streams."""

import json
import logging
from collections.abc import AsyncGenerator, Callable, Iterable
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from fairkv_jax.engine.request import RequestOutput
from fairkv_jax.serve.client_work import unless_gone
from fairkv_jax.serve.errors import error_body, message_of, status_of
from fairkv_jax.serve.output_stream import OutputStream
from fairkv_jax.serve.protocol import StreamOptions

log = logging.getLogger(__name__)

MAY_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
"""What the OpenAPI schema says of operations that answer in chunks if the request says `stream`."""


def usage(
    outputs: Iterable[RequestOutput], choices: int, num_reasoning: int | None = None
) -> dict[str, Any]:
    """Counts the tokens of all prompts, once each, and of all outputs.

    `kept_prompt_tokens` is an extension: prompt tokens kept per head, averaged over layers and
    heads. Of the details, those are given that are known: there are only text tokens, and no
    predicted ones. `num_reasoning` is how many tokens belong to the reasoning, None if nothing
    separates it.
    """
    outputs = list(outputs)
    once = outputs[::choices]
    prompt = sum(len(output.prompt_token_ids) for output in once)
    completion = sum(len(output.outputs[0].token_ids) for output in outputs)
    kept = sum(float(o.kv_lengths.mean()) for o in once if o.kv_lengths is not None)
    cached = sum(output.num_cached_tokens or 0 for output in once)
    reasoning = {} if num_reasoning is None else {"reasoning_tokens": num_reasoning}
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {
            "cached_tokens": cached,
            "text_tokens": prompt,
            "audio_tokens": 0,
            "image_tokens": 0,
        },
        "completion_tokens_details": {
            "text_tokens": completion,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
            **reasoning,
        },
        "kept_prompt_tokens": round(kept, 2),
    }


def chunk_usage(
    options: StreamOptions | None, output: RequestOutput, num_reasoning: int | None = None
) -> dict[str, Any]:
    """Returns the `usage` field of a streamed chunk as the stream options ask for it.

    There is no field without `include_usage`. Otherwise it is null before the last chunk, unless
    `continuous_usage_stats` is set.
    """
    return _as_asked(options, lambda: usage([output], 1, num_reasoning))


def opening_usage(options: StreamOptions | None, num_prompt_tokens: int) -> dict[str, Any]:
    """Returns `chunk_usage` of a chunk that comes before the first token."""
    counts = {"completion_tokens": 0, "total_tokens": num_prompt_tokens}
    return _as_asked(options, lambda: {"prompt_tokens": num_prompt_tokens, **counts})


def _as_asked(options: StreamOptions | None, count: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    if not options or not options.include_usage:
        return {}
    return {"usage": count() if options.continuous_usage_stats else None}


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
    """Sends an error as the last event, because the status has been sent before."""
    try:
        async for chunk in chunks:
            yield _event(chunk)
    except Exception as error:
        if status_of(error) == 500:
            log.exception("a stream failed")
        yield _event(error_body(status_of(error), message_of(error)))
    yield b"data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False, allow_nan=False).encode() + b"\n\n"


async def stream(
    request: Request, outputs: OutputStream, chunks: AsyncGenerator[dict[str, Any], None]
) -> EventStream:
    """Responds with chunks as soon as there is a first output: until then, an error has a status.

    Raises:
        ClientGone: the client disconnected, and its running requests were aborted.
    """
    try:
        await unless_gone(request, outputs.started())
    except BaseException:
        outputs.close()
        raise
    return EventStream(chunks, outputs)


async def collect(request: Request, outputs: OutputStream) -> list[RequestOutput]:
    """Waits for the finished outputs, unless the client disconnects first.

    Raises:
        ClientGone: the client disconnected, and its running requests were aborted.
    """
    try:
        return await unless_gone(request, outputs.collect())
    finally:
        outputs.close()
