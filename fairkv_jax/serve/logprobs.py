"""Log-probabilities in OpenAI's two formats, for any stretch of an output."""

from typing import Any

from fairkv_jax.engine.request import CompletionOutput, Logprob

LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


def completion_logprobs(
    output: CompletionOutput, start: int, num_top: int, text_offset: int
) -> dict[str, list[Any]]:
    """For /v1/completions: four parallel lists over the tokens from `start` on.

    `text_offset` is where the first of them begins, in characters.
    """
    lists: dict[str, list[Any]] = {
        "text_offset": [],
        "token_logprobs": [],
        "tokens": [],
        "top_logprobs": [],
    }
    for token_id, place in _tokens(output, start):
        chosen = place[token_id]
        lists["text_offset"].append(text_offset)
        lists["token_logprobs"].append(_finite(chosen))
        lists["tokens"].append(chosen.decoded_token)
        lists["top_logprobs"].append(
            {entry.decoded_token: _finite(entry) for entry in _top(place, num_top, chosen)}
        )
        text_offset += len(chosen.decoded_token)
    return lists


def chat_logprobs(output: CompletionOutput, start: int, num_top: int) -> dict[str, list[Any]]:
    """For /v1/chat/completions: one entry per token from `start` on."""
    content = []
    for token_id, place in _tokens(output, start):
        top = [_entry(entry) for entry in _top(place, num_top)]
        content.append({**_entry(place[token_id]), "top_logprobs": top})
    return {"content": content}


def _tokens(output: CompletionOutput, start: int) -> list[tuple[int, dict[int, Logprob]]]:
    return list(zip(output.token_ids, output.logprobs or [], strict=True))[start:]


def _top(place: dict[int, Logprob], num_top: int, *also: Logprob) -> list[Logprob]:
    """The likeliest ones, and those of `also` that are not among them."""
    ranked = sorted(place.values(), key=lambda entry: entry.rank)
    likeliest = [entry for entry in ranked if entry.rank <= num_top]
    return likeliest + [entry for entry in also if entry not in likeliest]


def _entry(entry: Logprob) -> dict[str, Any]:
    token = entry.decoded_token
    return {"token": token, "logprob": _finite(entry), "bytes": list(token.encode())}


def _finite(entry: Logprob) -> float:
    return max(entry.logprob, LOWEST)
