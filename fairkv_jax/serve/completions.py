"""POST /v1/completions."""

import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from fairkv_jax.engine.request import Logprob, RequestOutput
from fairkv_jax.serve.inputs import Prompt, compile_grammar, encode_prompts, fan_out
from fairkv_jax.serve.logprobs import ShownTokens, completion_logprobs, prompt_logprobs
from fairkv_jax.serve.output_stream import OutputStream
from fairkv_jax.serve.protocol import CompletionBody, token_names
from fairkv_jax.serve.responses import MAY_STREAM, chunk_usage, collect, stream, usage
from fairkv_jax.serve.service import StrictRoute, owner_of, response_id, service_of
from fairkv_jax.tokenizer import Tokenizer

router = APIRouter(route_class=StrictRoute)


@router.post("/v1/completions", responses=MAY_STREAM)
async def create_completion(body: CompletionBody, request: Request) -> Response:
    """Generates continuations of one or more prompts."""
    service = service_of(request)
    service.check_model(body.model)
    engine = service.engine.engine
    prompts = await encode_prompts(
        engine,
        body.prompts,
        with_text=bool(body.echo),
        with_offsets=bool(body.echo) and body.logprobs is not None,
        add_special_tokens=body.adds_special_tokens,
    )
    await compile_grammar(request, body)
    answer_id = response_id(request, "cmpl", body.request_id)
    requests = fan_out(answer_id, prompts, body, owner_of(request))
    head = {
        "id": answer_id,
        "object": "text_completion",
        "created": int(time.time()),
        "model": service.model_name,
    }
    outputs = service.submit(request, requests, body.n or 1)
    choices = [
        _Choice(index, body, prompts[index // (body.n or 1)], engine.tokenizer)
        for index in range(len(requests))
    ]
    if body.stream:
        return await stream(request, outputs, _chunks(head, body, outputs, choices))
    finished = await collect(request, outputs)
    answers = [choice.advance(output) for choice, output in zip(choices, finished, strict=True)]
    return JSONResponse({**head, "choices": answers, "usage": usage(finished, body.n or 1)})


async def _chunks(
    head: dict[str, Any], body: CompletionBody, outputs: OutputStream, choices: list["_Choice"]
) -> AsyncGenerator[dict[str, Any], None]:
    latest: dict[int, RequestOutput] = {}
    async for index, output in outputs:
        latest[index] = output
        choice = choices[index]
        if choice.has_news(output):
            usage_so_far = chunk_usage(body.stream_options, output)
            yield {**head, "choices": [choice.advance(output)], **usage_so_far}
    if body.include_usage:
        finished = [latest[index] for index in sorted(latest)]
        yield {**head, "choices": [], "usage": usage(finished, body.n or 1)}


class _Choice:
    """Tracks how much of a choice has been sent. With `echo`, it begins with the prompt."""

    def __init__(self, index: int, body: CompletionBody, prompt: Prompt, tokenizer: Tokenizer):
        self._index = index
        self._echo = bool(body.echo)
        self._num_top = body.num_logprobs
        self._tells_prompt = body.prompt_logprobs is not None
        self._returns_token_ids = bool(body.return_token_ids)
        self._prompt_offsets = prompt.offsets or []
        self._names = token_names(body, tokenizer)
        self._shown = ShownTokens(self._names)
        self._num_characters = self._num_logprobs = self._num_ids = 0
        self._has_begun = False

    def has_news(self, output: RequestOutput) -> bool:
        """Returns whether there is something to send.

        The detokenizer may hold text back while tokens advance. Then there is nothing.
        """
        return output.finished or len(self._text(output)) > self._num_characters

    def advance(self, output: RequestOutput) -> dict[str, Any]:
        """Returns the part of the output that has not been sent, as a choice."""
        done, text = output.outputs[0], self._text(output)
        news = text[self._num_characters :]
        self._num_characters = len(text)
        told: dict[str, Any] = {}
        if self._tells_prompt:
            told["prompt_logprobs"] = prompt_logprobs(output)
        if self._returns_token_ids:
            if not self._has_begun:
                told["prompt_token_ids"] = output.prompt_token_ids
            told["token_ids"] = done.token_ids[self._num_ids :]
            self._num_ids = len(done.token_ids)
        self._has_begun = True
        return {
            "index": self._index,
            "text": news,
            "logprobs": None if self._num_top is None else self._logprobs(output, self._num_top),
            "finish_reason": done.finish_reason,
            "stop_reason": done.stop_reason,
            **told,
        }

    def _logprobs(self, output: RequestOutput, num_top: int) -> dict[str, Any]:
        """Returns the log-probabilities of the tokens that the text shows, after those sent."""
        start = len(output.prompt or "") if self._echo else 0
        offsets = [start + offset for offset in self._shown.offsets(output)]
        if self._echo:
            offsets = self._prompt_offsets + offsets
        fresh = slice(self._num_logprobs, len(offsets))
        self._num_logprobs = len(offsets)
        return completion_logprobs(
            self._token_ids(output)[fresh],
            self._token_logprobs(output)[fresh],
            offsets[fresh],
            num_top,
            self._names,
        )

    def _text(self, output: RequestOutput) -> str:
        prompt = (output.prompt or "") if self._echo else ""
        return prompt + output.outputs[0].text

    def _token_ids(self, output: RequestOutput) -> list[int]:
        prompt = output.prompt_token_ids if self._echo else []
        return prompt + output.outputs[0].token_ids

    def _token_logprobs(self, output: RequestOutput) -> list[dict[int, Logprob] | None]:
        prompt = (output.prompt_logprobs or []) if self._echo else []
        return [*prompt, *(output.outputs[0].logprobs or [])]
