"""POST /tokenize and POST /detokenize: the model's tokenizer over HTTP."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from pydantic import Field, model_validator

from fairkv_jax.serve.body import Body, Integers
from fairkv_jax.serve.errors import ApiError
from fairkv_jax.serve.inputs import encode, render_chat
from fairkv_jax.serve.messages import Message, TemplateOptions
from fairkv_jax.serve.service import StrictRoute, service_of

router = APIRouter(route_class=StrictRoute)


class TokenizeBody(TemplateOptions):
    """The body of POST /tokenize: either a text or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _prompt_or_messages(self) -> "TokenizeBody":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeBody(Body):
    """The body of POST /detokenize."""

    model: str | None = None
    tokens: Integers
    skip_special_tokens: bool | None = None
    """Whether special tokens, such as "<|im_end|>", add nothing to the text. Default: no."""


@router.post("/tokenize")
async def tokenize(body: TokenizeBody, request: Request) -> dict[str, Any]:
    """Tokenizes a text, or a conversation that is rendered with the chat template."""
    service = service_of(request)
    service.check_model(body.model)
    engine = service.engine.engine
    if body.messages is not None:
        prompt = await render_chat(request, body.messages, body)
    else:
        adds = body.add_special_tokens is not False
        prompt = await encode(engine, body.prompt or "", add_special_tokens=adds)
    token_ids = prompt.token_ids
    answer = {
        "count": len(token_ids),
        "max_model_len": engine.engine_config.max_model_len,
        "tokens": token_ids,
    }
    if body.return_token_strs:
        answer["token_strs"] = [engine.tokenizer.token_text(token_id) for token_id in token_ids]
    return answer


@router.post("/detokenize")
async def detokenize(body: DetokenizeBody, request: Request) -> dict[str, str]:
    """Converts token ids to text."""
    service = service_of(request)
    service.check_model(body.model)
    engine = service.engine.engine
    vocab_size = engine.model_config.vocab_size
    if any(not 0 <= token_id < vocab_size for token_id in body.tokens):
        raise ApiError(400, f"token ids must be between 0 and {vocab_size - 1}", "tokens")
    return {
        "prompt": await asyncio.to_thread(
            engine.tokenizer.decode, body.tokens, bool(body.skip_special_tokens)
        )
    }
