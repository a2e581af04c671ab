"""From what a client sent to what the engine takes: text to token ids, one request per choice."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fairkv_jax.engine.request import Request
from fairkv_jax.sampling_params import SamplingParams
from fairkv_jax.serve.async_engine import Engine
from fairkv_jax.serve.errors import ApiError
from fairkv_jax.serve.protocol import Message


@dataclass(frozen=True)
class Prompt:
    token_ids: list[int]
    text: str | None = None


async def encode_prompts(engine: Engine, prompts: Sequence[str | list[int]]) -> list[Prompt]:
    """The prompts of a completion, where they are not token ids already."""
    return [
        await encode(engine, prompt) if isinstance(prompt, str) else Prompt(prompt)
        for prompt in prompts
    ]


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


def fan_out(
    answer_id: str, prompts: Sequence[Prompt], params: SamplingParams, choices: int
) -> list[Request]:
    """One request per prompt and choice, choices of one prompt side by side.

    Given a seed, the choices of a prompt have consecutive ones, so that they differ and all of
    them can be had again.
    """
    requests = []
    for place, prompt in enumerate(prompts):
        for choice in range(choices):
            seeded = params
            if params.seed is not None and choice:
                seeded = replace(params, seed=(params.seed + choice) % 2**64)
            requests.append(
                Request(f"{answer_id}-{place}-{choice}", prompt.token_ids, seeded, prompt.text)
            )
    return requests
