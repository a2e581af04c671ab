"""Log-probabilities in OpenAI's two formats, for any stretch of an output."""

from collections.abc import Callable, Sequence
from typing import Any

from fairkv_jax.engine.request import CompletionOutput, Logprob, RequestOutput

LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


def completion_logprobs(
    tokens: Sequence[int],
    places: Sequence[dict[int, Logprob] | None],
    num_top: int,
    text_offset: int,
    token_text: Callable[[int], str],
) -> dict[str, list[Any]]:
    """For /v1/completions: four parallel lists over tokens, where `places` has their likelihoods.

    A place of None, of a token that nothing precedes, has none. `text_offset` is where the first
    token begins, in characters.
    """
    lists: dict[str, list[Any]] = {
        "text_offset": [],
        "token_logprobs": [],
        "tokens": [],
        "top_logprobs": [],
    }
    for token_id, place in zip(tokens, places, strict=True):
        chosen = None if place is None else place[token_id]
        text = token_text(token_id) if chosen is None else chosen.decoded_token
        lists["text_offset"].append(text_offset)
        lists["tokens"].append(text)
        lists["token_logprobs"].append(None if chosen is None else _finite(chosen))
        lists["top_logprobs"].append(
            {entry.decoded_token: _finite(entry) for entry in _top(place, num_top, chosen)}
            if place and chosen
            else None
        )
        text_offset += len(text)
    return lists


def chat_logprobs(output: CompletionOutput, start: int, num_top: int) -> dict[str, list[Any]]:
    """For /v1/chat/completions: one entry per token from `start` on."""
    content = []
    chosen = zip(output.token_ids, output.logprobs or [], strict=True)
    for token_id, place in list(chosen)[start:]:
        top = [_entry(entry) for entry in _top(place, num_top)]
        content.append({**_entry(place[token_id]), "top_logprobs": top})
    return {"content": content}


def prompt_logprobs(output: RequestOutput) -> list[dict[str, dict[str, Any]] | None]:
    """For either, vLLM's extension: for each token of the prompt the likelihoods by token id."""
    return [
        None
        if place is None
        else {str(token_id): _told(entry) for token_id, entry in place.items()}
        for place in output.prompt_logprobs or []
    ]


def _told(entry: Logprob) -> dict[str, Any]:
    return {"logprob": _finite(entry), "rank": entry.rank, "decoded_token": entry.decoded_token}


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
