"""POST /v1/chat/completions."""

import time
from collections.abc import AsyncGenerator
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from fairkv_jax.engine.request import RequestOutput
from fairkv_jax.serve.async_engine import OutputStream
from fairkv_jax.serve.inputs import compile_grammar, fan_out, render_chat
from fairkv_jax.serve.protocol import ChatBody
from fairkv_jax.serve.responses import (
    EventStream,
    chat_logprobs,
    chunk_usage,
    collect,
    prompt_logprobs,
    usage,
)
from fairkv_jax.serve.service import StrictRoute, owner_of, service_of

router = APIRouter(route_class=StrictRoute)


@router.post("/v1/chat/completions")
async def create_chat_completion(body: ChatBody, request: Request) -> Response:
    """Generates the assistant's next message of a conversation."""
    service = service_of(request)
    service.check_model(body.model)
    engine, owner = service.engine.engine, owner_of(request)
    prefix = None if body.prefix_id is None else engine.prefixes.get(body.prefix_id, owner)
    prompt = await render_chat(
        request,
        body.messages,
        add_generation_prompt=body.add_generation_prompt is not False,
        prefix=prefix,
    )
    await compile_grammar(request, body)
    answer_id = f"chatcmpl-{uuid4().hex}"
    requests = fan_out(answer_id, [prompt], body, owner)
    head = {"id": answer_id, "created": int(time.time()), "model": service.model_name}
    outputs = service.submit(request, requests, body.n or 1)
    if body.stream:
        head["object"] = "chat.completion.chunk"
        return EventStream(_chunks(head, body, outputs), outputs)
    finished = await collect(request, outputs)
    choices = [_message(index, output, body) for index, output in enumerate(finished)]
    answer = {**head, "object": "chat.completion", "choices": choices}
    if body.prompt_logprobs is not None:
        answer["prompt_logprobs"] = prompt_logprobs(finished[0])
    return JSONResponse({**answer, "usage": usage(finished, body.n or 1)})


def _message(index: int, output: RequestOutput, body: ChatBody) -> dict[str, Any]:
    done = output.outputs[0]
    return {
        "index": index,
        "message": {"role": "assistant", "content": done.text},
        "logprobs": _logprobs(output, 0, body),
        "finish_reason": done.finish_reason,
        "stop_reason": done.stop_reason,
    }


def _logprobs(output: RequestOutput, start: int, body: ChatBody) -> dict[str, Any] | None:
    num_top = body.num_logprobs
    return None if num_top is None else chat_logprobs(output.outputs[0], start, num_top)


async def _chunks(
    head: dict[str, Any], body: ChatBody, outputs: OutputStream
) -> AsyncGenerator[dict[str, Any], None]:
    for index in range(body.n or 1):
        opening = {"role": "assistant", "content": ""}
        no_usage = chunk_usage(body.stream_options, None)
        yield {**head, "choices": [_delta(index, opening, None, None)], **no_usage}
    sent: dict[int, tuple[int, int]] = {}
    latest: dict[int, RequestOutput] = {}
    async for index, output in outputs:
        latest[index] = output
        done = output.outputs[0]
        chars, tokens = sent.get(index, (0, 0))
        text = done.text[chars:]
        logprobs = _logprobs(output, tokens, body)
        # The detokenizer may hold text back while tokens advance. Then there is nothing to send,
        # unless the client asked for log-probabilities.
        if text or output.finished or (logprobs and logprobs["content"]):
            choice = _delta(index, {"content": text} if text else {}, logprobs, done.finish_reason)
            yield {**head, "choices": [choice], **chunk_usage(body.stream_options, output)}
            sent[index] = len(done.text), len(done.token_ids)
    if body.include_usage:
        finished = [latest[index] for index in sorted(latest)]
        yield {**head, "choices": [], "usage": usage(finished, body.n or 1)}


def _delta(
    index: int,
    delta: dict[str, str],
    logprobs: dict[str, Any] | None,
    finish_reason: str | None,
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
