"""POST /v1/chat/completions."""

import time
from collections.abc import AsyncGenerator, Callable
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from fairkv_jax.engine.request import RequestOutput
from fairkv_jax.serve.inputs import compile_grammar, fan_out, render_chat
from fairkv_jax.serve.logprobs import ShownTokens, chat_logprobs, prompt_logprobs
from fairkv_jax.serve.message import MessageBuilder, MessageFormat
from fairkv_jax.serve.output_stream import OutputStream
from fairkv_jax.serve.protocol import ChatBody, token_names
from fairkv_jax.serve.responses import chunk_usage, collect, stream, usage
from fairkv_jax.serve.service import StrictRoute, owner_of, response_id, service_of
from fairkv_jax.tokenizer import Tokenizer

router = APIRouter(route_class=StrictRoute)


@router.post("/v1/chat/completions")
async def create_chat_completion(body: ChatBody, request: Request) -> Response:
    """Generates the assistant's next message of a conversation."""
    service = service_of(request)
    service.check_model(body.model)
    form = MessageFormat.of(body, service.options)
    if form.shows_special_tokens:
        body = body.model_copy(update={"skip_special_tokens": False})
    engine, owner = service.engine.engine, owner_of(request)
    prefix = None if body.prefix_id is None else engine.prefixes.get(body.prefix_id, owner)
    prompt = await render_chat(request, body.messages, body, prefix)
    reasoning = form.reasoning_parser(prompt.text or "")
    if reasoning is not None:
        body = body.after_reasoning(reasoning.precedes)
    await compile_grammar(request, body)
    answer_id = response_id(request, "chatcmpl", body.request_id)
    requests = fan_out(answer_id, [prompt], body, owner, may_continue=body.opens_answer)
    head = {"id": answer_id, "created": int(time.time()), "model": service.model_name}
    outputs = service.submit(request, requests, body.n or 1)
    builder = partial(form.builder, prompt.text or "")
    if body.stream:
        head["object"] = "chat.completion.chunk"
        return await stream(
            request, outputs, _chunks(head, body, outputs, engine.tokenizer, builder)
        )
    finished = await collect(request, outputs)
    choices = [
        _message(index, output, SentTokens(body, engine.tokenizer), builder())
        for index, output in enumerate(finished)
    ]
    told = _prompt_fields(body, finished[0].prompt_token_ids)
    answer = {**head, "object": "chat.completion", "choices": choices, **told}
    if body.prompt_logprobs is not None:
        answer["prompt_logprobs"] = prompt_logprobs(finished[0])
    return JSONResponse({**answer, "usage": usage(finished, body.n or 1)})


def _message(
    index: int, output: RequestOutput, tokens: "SentTokens", builder: MessageBuilder
) -> dict[str, Any]:
    done = output.outputs[0]
    return {
        "index": index,
        "message": builder.message(done.text),
        **tokens.advance(output),
        "finish_reason": builder.finish_reason(done.finish_reason),
        "stop_reason": done.stop_reason,
    }


class SentTokens:
    """Follows what has been sent of a choice's tokens."""

    def __init__(self, body: ChatBody, tokenizer: Tokenizer):
        self._num_top = body.num_logprobs
        self._returns_token_ids = bool(body.return_token_ids)
        self._names = token_names(body, tokenizer)
        self._shown = ShownTokens(self._names)
        self._num_ids = self._num_logprobs = 0

    def advance(self, output: RequestOutput) -> dict[str, Any]:
        """Returns what a choice tells of its tokens that have not been sent yet."""
        done = output.outputs[0]
        fields: dict[str, Any] = {"logprobs": None}
        if self._num_top is not None:
            start, self._num_logprobs = self._num_logprobs, len(self._shown.offsets(output))
            fresh = slice(start, self._num_logprobs)
            fields["logprobs"] = chat_logprobs(
                done.token_ids[fresh], (done.logprobs or [])[fresh], self._num_top, self._names
            )
        if self._returns_token_ids:
            fields["token_ids"] = done.token_ids[self._num_ids :]
            self._num_ids = len(done.token_ids)
        return fields


async def _chunks(
    head: dict[str, Any],
    body: ChatBody,
    outputs: OutputStream,
    tokenizer: Tokenizer,
    new_builder: Callable[[], MessageBuilder],
) -> AsyncGenerator[dict[str, Any], None]:
    told = _prompt_fields(body, outputs.requests[0].prompt_token_ids)
    for index in range(body.n or 1):
        opening = {"role": "assistant", "content": ""}
        no_usage = chunk_usage(body.stream_options, None)
        choice = _delta(index, opening, {"logprobs": None}, None)
        yield {**head, **told, "choices": [choice], **no_usage}
        told = {}
    choices: dict[int, _StreamedChoice] = {}
    latest: dict[int, RequestOutput] = {}
    async for index, output in outputs:
        latest[index] = output
        if index not in choices:
            choices[index] = _StreamedChoice(index, SentTokens(body, tokenizer), new_builder())
        choice = choices[index].advance(output)
        if choice is not None:
            yield {**head, "choices": [choice], **chunk_usage(body.stream_options, output)}
    if body.include_usage:
        finished = [latest[index] for index in sorted(latest)]
        yield {**head, "choices": [], "usage": usage(finished, body.n or 1)}


class _StreamedChoice:
    """Follows what has been sent of a choice."""

    def __init__(self, index: int, tokens: SentTokens, builder: MessageBuilder):
        self._index = index
        self._tokens = tokens
        self._builder = builder
        self._num_characters = 0

    def advance(self, output: RequestOutput) -> dict[str, Any] | None:
        """Returns what is new of the choice; None if there is nothing to send yet.

        Tokens advance without anything to send while their text is held back: by the detokenizer,
        or because it may be a marker of a tool call or of reasoning.
        """
        done = output.outputs[0]
        text = done.text[self._num_characters :]
        self._num_characters = len(done.text)
        delta = self._builder.delta(text, is_last=output.finished)
        if not delta and not output.finished:
            return None
        reason = self._builder.finish_reason(done.finish_reason)
        return _delta(self._index, delta, self._tokens.advance(output), reason)


def _delta(
    index: int, delta: dict[str, Any], tokens: dict[str, Any], finish_reason: str | None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, **tokens, "finish_reason": finish_reason}


def _prompt_fields(body: ChatBody, token_ids: list[int]) -> dict[str, Any]:
    return {"prompt_token_ids": token_ids} if body.return_token_ids else {}
