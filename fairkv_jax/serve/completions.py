"""POST /v1/completions."""

import time
from collections.abc import AsyncGenerator
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from fairkv_jax.engine.request import Logprob, RequestOutput
from fairkv_jax.serve.async_engine import OutputStream
from fairkv_jax.serve.inputs import compile_grammar, encode_prompts, fan_out
from fairkv_jax.serve.protocol import CompletionBody
from fairkv_jax.serve.responses import (
    EventStream,
    chunk_usage,
    collect,
    completion_logprobs,
    prompt_logprobs,
    usage,
)
from fairkv_jax.serve.service import StrictRoute, owner_of, service_of
from fairkv_jax.tokenizer import Tokenizer

router = APIRouter(route_class=StrictRoute)


@router.post("/v1/completions")
async def create_completion(body: CompletionBody, request: Request) -> Response:
    """Generates continuations of one or more prompts."""
    service = service_of(request)
    service.check_model(body.model)
    engine = service.engine.engine
    prompts = await encode_prompts(
        engine,
        body.prompts,
        with_text=bool(body.echo),
        add_special_tokens=body.prefix_id is None,
    )
    await compile_grammar(request, body)
    answer_id = f"cmpl-{uuid4().hex}"
    requests = fan_out(answer_id, prompts, body, owner_of(request))
    head = {
        "id": answer_id,
        "object": "text_completion",
        "created": int(time.time()),
        "model": service.model_name,
    }
    outputs = service.submit(request, requests, body.n or 1)
    if body.stream:
        return EventStream(_chunks(head, body, outputs, engine.tokenizer), outputs)
    finished = await collect(request, outputs)
    choices = [
        _Choice(index, body, engine.tokenizer).advance(output)
        for index, output in enumerate(finished)
    ]
    return JSONResponse({**head, "choices": choices, "usage": usage(finished, body.n or 1)})


async def _chunks(
    head: dict[str, Any], body: CompletionBody, outputs: OutputStream, tokenizer: Tokenizer
) -> AsyncGenerator[dict[str, Any], None]:
    choices: dict[int, _Choice] = {}
    latest: dict[int, RequestOutput] = {}
    async for index, output in outputs:
        latest[index] = output
        choice = choices.setdefault(index, _Choice(index, body, tokenizer))
        if choice.has_news(output):
            usage_so_far = chunk_usage(body.stream_options, output)
            yield {**head, "choices": [choice.advance(output)], **usage_so_far}
    if body.include_usage:
        finished = [latest[index] for index in sorted(latest)]
        yield {**head, "choices": [], "usage": usage(finished, body.n or 1)}


class _Choice:
    """Tracks how much of a choice has been sent. With `echo`, it begins with the prompt."""

    def __init__(self, index: int, body: CompletionBody, tokenizer: Tokenizer):
        self._index = index
        self._echo = bool(body.echo)
        self._num_top = body.num_logprobs
        self._tells_prompt = body.prompt_logprobs is not None
        self._token_text = tokenizer.token_text
        self._chars = self._tokens = self._text_offset = 0

    def has_news(self, output: RequestOutput) -> bool:
        """Returns whether there is something to send.

        The detokenizer may hold text back while tokens advance; then only log-probabilities are.
        """
        more_tokens = self._num_top is not None and len(self._token_ids(output)) > self._tokens
        return output.finished or len(self._text(output)) > self._chars or more_tokens

    def advance(self, output: RequestOutput) -> dict[str, Any]:
        """Returns the part of the output that has not been sent, as a choice."""
        done = output.outputs[0]
        text, token_ids = self._text(output), self._token_ids(output)
        logprobs = None
        if self._num_top is not None:
            logprobs = completion_logprobs(
                token_ids[self._tokens :],
                self._token_logprobs(output)[self._tokens :],
                self._num_top,
                self._text_offset,
                self._token_text,
            )
            self._text_offset += sum(map(len, logprobs["tokens"]))
        news = text[self._chars :]
        self._chars, self._tokens = len(text), len(token_ids)
        told = {"prompt_logprobs": prompt_logprobs(output)} if self._tells_prompt else {}
        return {
            "index": self._index,
            "text": news,
            "logprobs": logprobs,
            "finish_reason": done.finish_reason,
            "stop_reason": done.stop_reason,
            **told,
        }

    def _text(self, output: RequestOutput) -> str:
        prompt = (output.prompt or "") if self._echo else ""
        return prompt + output.outputs[0].text

    def _token_ids(self, output: RequestOutput) -> list[int]:
        prompt = output.prompt_token_ids if self._echo else []
        return prompt + output.outputs[0].token_ids

    def _token_logprobs(self, output: RequestOutput) -> list[dict[int, Logprob] | None]:
        prompt = (output.prompt_logprobs or []) if self._echo else []
        return [*prompt, *(output.outputs[0].logprobs or [])]
