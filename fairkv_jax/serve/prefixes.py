"""POST, GET and DELETE /v1/prefixes: prefixes that are compressed once and shared by requests."""

from contextlib import suppress
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field, field_validator, model_validator

from fairkv_jax.engine import request as engine_request
from fairkv_jax.engine.conversation import flat_message
from fairkv_jax.engine.prefix_registry import UnknownPrefix
from fairkv_jax.sampling_params import SamplingParams
from fairkv_jax.serve.body import Integers, OptionalInteger
from fairkv_jax.serve.inputs import encode_prompts, render_chat
from fairkv_jax.serve.messages import Message, TemplateOptions
from fairkv_jax.serve.responses import collect
from fairkv_jax.serve.service import StrictRoute, owner_of, service_of

creation = APIRouter(route_class=StrictRoute)
router = APIRouter()


class PrefixBody(TemplateOptions):
    """POST /v1/prefixes: either a prompt or a conversation."""

    model: str | None = None
    prompt: str | Integers | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    kv_policy: str | None = None
    kv_budget: OptionalInteger = Field(None, ge=1)
    kv_ratio: float | None = Field(None, ge=0, lt=1)
    cache_salt: str | None = None
    add_generation_prompt: bool | None = None
    """Whether the prefix ends where the assistant's turn begins. Default: no."""

    @field_validator("prompt")
    @classmethod
    def _some_prompt(cls, prompt: Any) -> Any:
        if prompt is not None and not prompt:
            raise ValueError("the prompt is empty: give at least one token")
        return prompt

    @model_validator(mode="after")
    def _prompt_or_messages(self) -> "PrefixBody":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self

    @property
    def opens_answer(self) -> bool:
        return bool(self.add_generation_prompt)


@creation.post("/v1/prefixes")
async def create_prefix(body: PrefixBody, request: Request) -> Response:
    """Reads and compresses the beginning of prompts; an equal one is computed once."""
    service = service_of(request)
    service.check_model(body.model)
    engine = service.engine.engine
    messages = None
    if body.messages is not None:
        messages = tuple(flat_message(message.as_dict()) for message in body.messages)
        prompt = await render_chat(request, body.messages, body, divides=False)
    else:
        adds = body.add_special_tokens is not False
        (prompt,) = await encode_prompts(engine, [body.prompt or ""], add_special_tokens=adds)
    wanted = engine_request.Request(
        f"prefix-{uuid4().hex}",
        prompt.token_ids,
        SamplingParams(max_tokens=0),
        prompt.text,
        kv_policy=body.kv_policy,
        kv_budget=body.kv_budget,
        kv_ratio=body.kv_ratio,
        messages=messages,
        caches_prefix=True,
        owner=owner_of(request),
        cache_salt=body.cache_salt or "",
    )
    (output,) = await collect(request, service.submit(request, [wanted], 1))
    assert output.cached_prefix is not None
    return JSONResponse(_as_json(output.cached_prefix))


@router.get("/v1/prefixes")
async def list_prefixes(request: Request) -> dict[str, Any]:
    """Lists the prefixes of the API key, the oldest first."""
    engine, owner = service_of(request).engine.engine, owner_of(request)
    data = []
    for record in engine.prefixes.of_owner(owner):
        with suppress(UnknownPrefix):  # it has been deleted meanwhile
            data.append(_as_json(engine.cached_prefix(record.id, owner)))
    return {"object": "list", "data": data}


@router.get("/v1/prefixes/{prefix_id}")
async def show_prefix(prefix_id: str, request: Request) -> dict[str, Any]:
    """Shows a prefix of the API key."""
    engine = service_of(request).engine.engine
    return _as_json(engine.cached_prefix(prefix_id, owner_of(request)))


@router.delete("/v1/prefixes/{prefix_id}", status_code=204)
async def delete_prefix(prefix_id: str, request: Request) -> None:
    """Forgets a prefix; requests that use it finish."""
    await service_of(request).engine.delete_prefix(prefix_id, owner_of(request))


def _as_json(prefix: engine_request.CachedPrefix) -> dict[str, Any]:
    return {
        "id": prefix.id,
        "object": "prefix",
        "num_tokens": prefix.num_tokens,
        "kept_tokens": round(float(prefix.kept_tokens.mean()), 2),
        "bytes": prefix.bytes,
    }
