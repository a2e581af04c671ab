"""POST /v1/completions."""

import time
from collections.abc import AsyncGenerator
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from fairkv_jax.engine.request import RequestOutput
from fairkv_jax.serve.async_engine import OutputStream
from fairkv_jax.serve.inputs import encode_prompts, fan_out
from fairkv_jax.serve.logprobs import completion_logprobs
from fairkv_jax.serve.protocol import CompletionBody
from fairkv_jax.serve.service import StrictRoute, service_of
from fairkv_jax.serve.streaming import EventStream, collect
from fairkv_jax.serve.usage import usage

router = APIRouter(route_class=StrictRoute)


@router.post("/v1/completions")
async def create_completion(body: CompletionBody, request: Request) -> Response:
    """Continue one prompt or several."""
    service = service_of(request)
    service.check_model(body.model)
    prompts = await encode_prompts(service.engine.engine, body.prompts)
    answer_id = f"cmpl-{uuid4().hex}"
    requests = fan_out(answer_id, prompts, body.sampling_params(), body.n or 1)
    head = {
        "id": answer_id,
        "object": "text_completion",
        "created": int(time.time()),
        "model": service.model_name,
    }
    outputs = service.submit(request, requests, body.n or 1)
    if body.stream:
        return EventStream(_chunks(head, body, outputs), outputs)
    finished = await collect(request, outputs)
    choices = [_Choice(place, body).advance(output) for place, output in enumerate(finished)]
    return JSONResponse({**head, "choices": choices, "usage": usage(finished, body.n or 1)})


async def _chunks(
    head: dict[str, Any], body: CompletionBody, outputs: OutputStream
) -> AsyncGenerator[dict[str, Any], None]:
    choices: dict[int, _Choice] = {}
    latest: dict[int, RequestOutput] = {}
    null_usage = {"usage": None} if body.include_usage else {}
    async for place, output in outputs:
        latest[place] = output
        choice = choices.setdefault(place, _Choice(place, body))
        if choice.has_news(output):
            yield {**head, "choices": [choice.advance(output)], **null_usage}
    if body.include_usage:
        finished = [latest[place] for place in sorted(latest)]
        yield {**head, "choices": [], "usage": usage(finished, body.n or 1)}


class _Choice:
    """How much of one output has been sent."""

    def __init__(self, index: int, body: CompletionBody):
        self._index = index
        self._num_top = body.num_logprobs
        self._chars = self._tokens = self._text_offset = 0

    def has_news(self, output: RequestOutput) -> bool:
        """Text may be held back while tokens advance; nothing is sent then, unless asked for."""
        done = output.outputs[0]
        more_tokens = self._num_top is not None and len(done.token_ids) > self._tokens
        return output.finished or len(done.text) > self._chars or more_tokens

    def advance(self, output: RequestOutput) -> dict[str, Any]:
        """The part of the output that has not been sent, as a choice."""
        done = output.outputs[0]
        logprobs = None
        if self._num_top is not None:
            logprobs = completion_logprobs(done, self._tokens, self._num_top, self._text_offset)
            self._text_offset += sum(map(len, logprobs["tokens"]))
        text = done.text[self._chars :]
        self._chars, self._tokens = len(done.text), len(done.token_ids)
        return {
            "index": self._index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": done.finish_reason,
            "stop_reason": done.stop_reason,
        }
