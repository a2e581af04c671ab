"""Converts HTTP requests to engine requests: tokenizes prompts and makes a request per choice."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from uuid import uuid4

from fastapi import Request as HttpRequest

from fairkv_jax.engine.conversation import rendered_chat
from fairkv_jax.engine.request import Boundary, PrefixRecord, Request
from fairkv_jax.engine.structured_output import TooManyGrammars
from fairkv_jax.serve.engine_protocol import Engine
from fairkv_jax.serve.errors import ApiError
from fairkv_jax.serve.logprobs import prompt_offsets
from fairkv_jax.serve.messages import Message, TemplateOptions
from fairkv_jax.serve.protocol import GenerationBody
from fairkv_jax.serve.service import client_of, service_of


@dataclass(frozen=True)
class Prompt:
    token_ids: list[int]
    text: str | None = None
    offsets: list[int] | None = None
    """Where each token begins in the text; None unless asked for."""
    boundaries: tuple[Boundary, ...] = ()


async def encode_prompts(
    engine: Engine,
    prompts: Sequence[str | list[int]],
    *,
    with_text: bool = False,
    with_offsets: bool = False,
    add_special_tokens: bool = True,
) -> list[Prompt]:
    """Tokenizes the prompts of a completion; `with_text` also decodes prompts of token ids."""
    encoded = []
    for prompt in prompts:
        is_text = isinstance(prompt, str)
        if isinstance(prompt, str):
            one = await encode(engine, prompt, add_special_tokens=add_special_tokens)
        else:
            one = Prompt(prompt, await _decode(engine, prompt) if with_text else None)
        if with_offsets:
            known = one.text if is_text else None
            offsets = await asyncio.to_thread(
                prompt_offsets, engine.tokenizer, one.token_ids, known
            )
            one = replace(one, offsets=offsets)
        encoded.append(one)
    return encoded


async def _decode(engine: Engine, token_ids: list[int]) -> str | None:
    """Decodes a prompt, including special tokens. Returns None if a token id is out of range.

    The engine rejects such a prompt later.
    """
    if not all(0 <= token_id < engine.model_config.vocab_size for token_id in token_ids):
        return None
    return await asyncio.to_thread(engine.tokenizer.decode, token_ids, False)


async def encode(engine: Engine, text: str, *, add_special_tokens: bool = True) -> Prompt:
    """Tokenizes a text in another thread, because long texts would block the event loop.

    Raises:
        ApiError: the text is not valid Unicode.
    """
    encode = engine.tokenizer.encode
    try:
        return Prompt(await asyncio.to_thread(encode, text, add_special_tokens), text)
    except ValueError as error:
        raise ApiError(400, str(error), "prompt") from error


async def render_chat(
    request: HttpRequest,
    messages: Sequence[Message],
    options: TemplateOptions,
    prefix: PrefixRecord | None = None,
    divides: bool = True,
) -> Prompt:
    """Renders a conversation with the model's chat template and tokenizes it.

    The template writes the special tokens, so the tokenizer adds some only if the request says so.
    With `prefix`, the messages are those that follow the prefix's. If the engine caches prefixes,
    the prompt has boundaries, unless `divides` is false or special tokens are added.

    Raises:
        ApiError: the model has no template, the template rejects the conversation, or a text is not
            valid Unicode.
    """
    turns, adds = [message.as_dict() for message in messages], bool(options.add_special_tokens)
    service = service_of(request)
    engine = service.engine.engine
    try:
        rendered = await service.templates.run(
            request,
            client_of(request),
            rendered_chat,
            engine.tokenizer,
            turns,
            prefix,
            add_generation_prompt=options.opens_answer,
            continue_final_message=bool(options.continue_final_message),
            chat_template_kwargs=options.template_variables,
            divides=divides and not adds and engine.engine_config.enable_prefix_caching,
        )
        prompt = await asyncio.to_thread(rendered.tokenized, engine.tokenizer, adds)
    except ValueError as error:
        raise ApiError(400, str(error), "messages") from error
    return Prompt(prompt.token_ids, prompt.text, boundaries=prompt.boundaries)


async def compile_grammar(request: HttpRequest, body: GenerationBody) -> None:
    """Compiles the request's grammar, which can take seconds; others are served meanwhile.

    Raises:
        ApiError: the grammar is invalid or beyond the limits.
        ClientGone: the client disconnected.
    """
    constraint = body.structured_outputs_params()
    if constraint is None:
        return
    (field,) = body.constraining_fields
    service = service_of(request)
    compiling = service.engine.engine.compile_grammar
    try:
        await service.grammars.run(request, client_of(request), compiling, constraint)
    except TooManyGrammars as error:
        raise ApiError(503, str(error), field) from error
    except ValueError as error:
        raise ApiError(400, f"{field}: {error}", field) from error


def fan_out(
    answer_id: str,
    prompts: Sequence[Prompt],
    body: GenerationBody,
    owner: str,
    *,
    may_continue: bool = False,
) -> list[Request]:
    """Makes one engine request per prompt and choice; the choices of a prompt are adjacent.

    Their ids begin with that of the answer and are unique, also if two answers have the same id. A
    prompt is read once for all of its choices.

    If the request has a seed, the choices of a prompt have consecutive seeds, so that they differ
    and are reproducible.
    """
    params = body.sampling_params()
    requests, num_choices = [], body.n or 1
    unique_id = f"{answer_id}-{uuid4().hex[:16]}"
    for prompt_index, prompt in enumerate(prompts):
        same_prompt = f"{unique_id}-{prompt_index}" if num_choices > 1 else ""
        for choice in range(num_choices):
            seeded = params
            if params.seed is not None and choice:
                seeded = replace(params, seed=(params.seed + choice) % 2**64)
            requests.append(
                Request(
                    f"{unique_id}-{prompt_index}-{choice}",
                    prompt.token_ids,
                    seeded,
                    prompt.text,
                    kv_policy=body.kv_policy,
                    kv_budget=body.kv_budget,
                    kv_ratio=body.kv_ratio,
                    prefix_id=body.prefix_id,
                    owner=owner,
                    cache_salt=body.cache_salt or "",
                    boundaries=prompt.boundaries,
                    same_prompt=same_prompt,
                    may_continue=may_continue,
                )
            )
    return requests
