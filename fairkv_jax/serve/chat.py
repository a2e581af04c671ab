"""POST /v1/chat/completions."""

import time
from bisect import bisect_left
from collections.abc import AsyncGenerator, Callable, Sequence
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
from fairkv_jax.serve.responses import (
    MAY_STREAM,
    chunk_usage,
    collect,
    opening_usage,
    stream,
    usage,
)
from fairkv_jax.serve.service import StrictRoute, owner_of, response_id, service_of
from fairkv_jax.tokenizer import Tokenizer

router = APIRouter(route_class=StrictRoute)


@router.post("/v1/chat/completions", responses=MAY_STREAM)
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
        _Choice(index, SentTokens(body, engine.tokenizer), builder())
        for index in range(len(finished))
    ]
    messages = [choice.whole(output) for choice, output in zip(choices, finished, strict=True)]
    told = _prompt_fields(body, finished[0].prompt_token_ids)
    answer = {**head, "object": "chat.completion", "choices": messages, **told}
    if body.prompt_logprobs is not None:
        answer["prompt_logprobs"] = prompt_logprobs(finished[0])
    return JSONResponse({**answer, "usage": _usage(choices, finished)})


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

    def num_before(self, output: RequestOutput, end: int) -> int:
        """Returns how many tokens begin before a place in the text that has been reached."""
        return bisect_left(self._shown.offsets(output), end) if end else 0


async def _chunks(
    head: dict[str, Any],
    body: ChatBody,
    outputs: OutputStream,
    tokenizer: Tokenizer,
    new_builder: Callable[[], MessageBuilder],
) -> AsyncGenerator[dict[str, Any], None]:
    prompt = outputs.requests[0].prompt_token_ids
    told = _prompt_fields(body, prompt)
    so_far = opening_usage(body.stream_options, len(prompt))
    for index in range(body.n or 1):
        opening = {"role": "assistant", "content": ""}
        choice = _delta(index, opening, {"logprobs": None}, None)
        yield {**head, **told, "choices": [choice], **so_far}
        told = {}
    choices: dict[int, _Choice] = {}
    latest: dict[int, RequestOutput] = {}
    async for index, output in outputs:
        latest[index] = output
        if index not in choices:
            choices[index] = _Choice(index, SentTokens(body, tokenizer), new_builder())
        choice = choices[index]
        delta = choice.advance(output)
        if delta is not None:
            so_far = chunk_usage(body.stream_options, output, choice.num_reasoning(output))
            yield {**head, "choices": [delta], **so_far}
    if body.include_usage:
        order = sorted(latest)
        of_all = _usage([choices[index] for index in order], [latest[index] for index in order])
        yield {**head, "choices": [], "usage": of_all}


class _Choice:
    """Makes the message of a choice, or its deltas, and follows what has been sent of it."""

    def __init__(self, index: int, tokens: SentTokens, builder: MessageBuilder):
        self._index = index
        self._tokens = tokens
        self._builder = builder
        self._num_characters = 0
        self._num_reasoning = 0

    def whole(self, output: RequestOutput) -> dict[str, Any]:
        """Returns the choice of a finished output."""
        done = output.outputs[0]
        return {
            "index": self._index,
            "message": self._builder.message(done.text),
            **self._tokens.advance(output),
            "finish_reason": self._builder.finish_reason(done.finish_reason),
            "stop_reason": done.stop_reason,
        }

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

    def num_reasoning(self, output: RequestOutput) -> int | None:
        """Returns how many tokens belong to the reasoning; None if nothing separates it."""
        reasoning = self._builder.reasoning
        if reasoning is None:
            return None
        if reasoning.end is None:
            return len(output.outputs[0].token_ids)
        if not self._num_reasoning:
            self._num_reasoning = self._tokens.num_before(output, reasoning.end)
        return self._num_reasoning


def _usage(choices: Sequence[_Choice], outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """Counts the tokens of all choices, which have one prompt."""
    pairs = zip(choices, outputs, strict=True)
    counts = [choice.num_reasoning(output) for choice, output in pairs]
    known = [count for count in counts if count is not None]
    return usage(outputs, len(outputs), sum(known) if known else None)


def _delta(
    index: int, delta: dict[str, Any], tokens: dict[str, Any], finish_reason: str | None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, **tokens, "finish_reason": finish_reason}


def _prompt_fields(body: ChatBody, token_ids: list[int]) -> dict[str, Any]:
    return {"prompt_token_ids": token_ids} if body.return_token_ids else {}
