"""What an answer cost, in OpenAI's terms and in ours."""

from collections.abc import Iterable
from typing import Any

from fairkv_jax.engine.request import RequestOutput
from fairkv_jax.serve.protocol import StreamOptions


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


def chunk_usage(options: StreamOptions | None, output: RequestOutput | None) -> dict[str, Any]:
    """What a chunk says of it beside its choice: nothing unless asked for, and null until the end,
    unless it is wanted all the time."""
    if not options or not options.include_usage:
        return {}
    if not options.continuous_usage_stats or output is None:
        return {"usage": None}
    return {"usage": usage([output], 1)}
