"""POST /tokenize and /detokenize: the model's own tokenizer, for clients that count tokens."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request

from fairkv_jax.serve.errors import ApiError
from fairkv_jax.serve.inputs import encode, render_chat
from fairkv_jax.serve.protocol import DetokenizeBody, TokenizeBody
from fairkv_jax.serve.service import StrictRoute, service_of

router = APIRouter(route_class=StrictRoute)


@router.post("/tokenize")
async def tokenize(body: TokenizeBody, request: Request) -> dict[str, Any]:
    """The token ids of a text, or of a conversation as the chat template writes it."""
    service = service_of(request)
    service.check_model(body.model)
    engine = service.engine.engine
    if body.messages is not None:
        prompt = await render_chat(engine, body.messages, body.add_generation_prompt)
    else:
        prompt = await encode(engine, body.prompt or "")
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
    """The text of some token ids."""
    service = service_of(request)
    service.check_model(body.model)
    engine = service.engine.engine
    vocab_size = engine.model_config.vocab_size
    if any(not 0 <= token_id < vocab_size for token_id in body.tokens):
        raise ApiError(400, f"a token id lies outside of 0..{vocab_size - 1}", "tokens")
    return {"prompt": await asyncio.to_thread(engine.tokenizer.decode, body.tokens)}
