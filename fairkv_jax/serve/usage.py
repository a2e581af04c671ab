"""What an answer cost, in OpenAI's terms and in ours."""

from collections.abc import Iterable
from typing import Any

from fairkv_jax.engine.request import RequestOutput


def usage(outputs: Iterable[RequestOutput], choices: int) -> dict[str, Any]:
    """Tokens of all prompts, once each, and of all outputs.

    `kept_prompt_tokens` is an extension: of the prompt tokens, how many a head keeps in its cache,
    on average over layers and heads.
    """
    outputs = list(outputs)
    once = outputs[::choices]
    prompt = sum(len(output.prompt_token_ids) for output in once)
    completion = sum(len(output.outputs[0].token_ids) for output in outputs)
    kept = sum(float(o.kv_lengths.mean()) for o in once if o.kv_lengths is not None)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "kept_prompt_tokens": round(kept, 2),
    }
