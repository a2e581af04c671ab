"""From what a client sent to what the engine takes: text to token ids, one request per choice."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fairkv_jax.engine.request import Request
from fairkv_jax.serve.async_engine import Engine
from fairkv_jax.serve.errors import ApiError
from fairkv_jax.serve.protocol import GenerationBody, Message


@dataclass(frozen=True)
class Prompt:
    token_ids: list[int]
    text: str | None = None


async def encode_prompts(
    engine: Engine, prompts: Sequence[str | list[int]], *, with_text: bool
) -> list[Prompt]:
    """The prompts of a completion, as token ids; `with_text`: their texts as well."""
    encoded = []
    for prompt in prompts:
        if isinstance(prompt, str):
            encoded.append(await encode(engine, prompt))
        else:
            text = await _decode(engine, prompt) if with_text else None
            encoded.append(Prompt(prompt, text))
    return encoded


async def _decode(engine: Engine, token_ids: list[int]) -> str | None:
    """The text of a prompt, special tokens included; None if the engine will refuse its ids."""
    if not all(0 <= token_id < engine.model_config.vocab_size for token_id in token_ids):
        return None
    return await asyncio.to_thread(engine.tokenizer.decode, token_ids, False)


async def encode(engine: Engine, text: str, *, add_special_tokens: bool = True) -> Prompt:
    """In another thread: a megabyte of text takes a while, and others are being served.

    Raises:
        ApiError: the text is not Unicode.
    """
    encode = engine.tokenizer.encode
    try:
        return Prompt(await asyncio.to_thread(encode, text, add_special_tokens), text)
    except ValueError as error:
        raise ApiError(400, str(error), "prompt") from error


async def render_chat(
    engine: Engine, messages: Sequence[Message], add_generation_prompt: bool | None
) -> Prompt:
    """A conversation through the checkpoint's own template, which writes special tokens itself.

    Raises:
        ApiError: the model has no template, or it refuses the conversation.
    """
    turns = [message.as_dict() for message in messages]
    render = engine.tokenizer.apply_chat_template
    try:
        text = await asyncio.to_thread(render, turns, add_generation_prompt is not False)
    except ValueError as error:
        raise ApiError(400, str(error), "messages") from error
    return await encode(engine, text, add_special_tokens=False)


async def compile_grammar(engine: Engine, body: GenerationBody) -> None:
    """Compiles what the output must match, in another thread: that may take a second.

    Raises:
        ApiError: it has a fault.
    """
    constraint = body.structured_outputs_params()
    if constraint is None:
        return
    (field,) = body.constraining_fields
    try:
        await asyncio.to_thread(engine.compile_grammar, constraint)
    except ValueError as error:
        raise ApiError(400, f"{field}: {error}", field) from error


def fan_out(answer_id: str, prompts: Sequence[Prompt], body: GenerationBody) -> list[Request]:
    """One request per prompt and choice, choices of one prompt side by side.

    Given a seed, the choices of a prompt have consecutive ones, so that they differ and all of
    them can be had again.
    """
    params = body.sampling_params()
    requests = []
    for place, prompt in enumerate(prompts):
        for choice in range(body.n or 1):
            seeded = params
            if params.seed is not None and choice:
                seeded = replace(params, seed=(params.seed + choice) % 2**64)
            requests.append(
                Request(
                    f"{answer_id}-{place}-{choice}",
                    prompt.token_ids,
                    seeded,
                    prompt.text,
                    kv_policy=body.kv_policy,
                    kv_budget=body.kv_budget,
                )
            )
    return requests
