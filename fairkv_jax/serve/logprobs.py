"""Log-probabilities in responses: how tokens are named, and where they stand in the text.

Tokens need not be whole characters: an emoji can take four. The bytes of all tokens, joined, are
the text in UTF-8, and every token's offset is that of the character in which it begins. The tokens
of a stop string that is cut off the text are listed too, as in vLLM: their offsets are the text's
end at most.
"""

from bisect import bisect_left
from codecs import getincrementaldecoder
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fairkv_jax.engine.request import Logprob, RequestOutput
from fairkv_jax.tokenizer import Tokenizer

LOWEST = -9999.0
"""Replaces minus infinity, which JSON cannot represent."""

Positions = Sequence[dict[int, Logprob] | None]
"""Each token's log-probabilities by id, or None for a token that nothing precedes."""


@dataclass(frozen=True)
class TokenNames:
    """Names the tokens of one request's log-probabilities."""

    tokenizer: Tokenizer
    as_ids: bool = False
    """Whether tokens are named by their ids, as `return_tokens_as_token_ids` asks for."""
    skips_special_tokens: bool = True
    """Whether special tokens add nothing to the text."""

    def name(self, token_id: int, broken: str = "") -> str:
        """Returns the text of a token.

        The bytes of a token that is not valid UTF-8 are escaped after the prefix `broken`, as in
        OpenAI's responses.
        """
        if self.as_ids:
            return f"token_id:{token_id}"
        data = self.tokenizer.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return broken + "".join(f"\\x{byte:02x}" for byte in data)

    def bytes(self, token_id: int) -> list[int]:
        """Returns what a token adds to the text, in UTF-8."""
        if self.skips_special_tokens and self.tokenizer.is_special(token_id):
            return []
        return list(self.tokenizer.token_bytes(token_id))


class TextOffsets:
    """Finds where the tokens of an output begin in its text, as the tokens arrive."""

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special_tokens: bool, context: Sequence[int] = ()
    ):
        self._names = TokenNames(tokenizer, skips_special_tokens=skip_special_tokens)
        self._detokenizer = tokenizer.detokenizer(skip_special_tokens, context)
        self._begin_text()
        self._num_whole = 0
        """Characters of the text up to where no token begins within a character."""
        self.offsets: list[int] = []

    def extend(self, token_ids: Iterable[int]) -> None:
        for token_id in token_ids:
            self.offsets.append(self._num_whole + self._num_since)
            self._num_since += len(self._decoder.decode(bytes(self._names.bytes(token_id))))
            text = self._detokenizer.push(token_id)
            if text or not self._detokenizer.holds_back:
                self._num_whole += len(text)
                self._begin_text()

    def _begin_text(self) -> None:
        self._decoder = getincrementaldecoder("utf-8")("replace")
        self._num_since = 0


class ShownTokens:
    """Follows how many tokens of an output its text shows.

    Text is held back while it may become a stop string or a character is incomplete; so are the
    log-probabilities of its tokens.
    """

    def __init__(self, names: TokenNames):
        self._names = names
        self._offsets: TextOffsets | None = None

    def offsets(self, output: RequestOutput) -> list[int]:
        """Returns where each token that is shown begins in the text."""
        done = output.outputs[0]
        if self._offsets is None:
            self._offsets = TextOffsets(
                self._names.tokenizer,
                skip_special_tokens=self._names.skips_special_tokens,
                context=output.prompt_token_ids[-1:],
            )
        found = self._offsets.offsets
        self._offsets.extend(done.token_ids[len(found) :])
        if output.finished:
            return [min(offset, len(done.text)) for offset in found]
        return found[: bisect_left(found, len(done.text))]


def prompt_offsets(tokenizer: Tokenizer, token_ids: Sequence[int], text: str | None) -> list[int]:
    """Returns where the tokens of a prompt begin in its text.

    `text` is None if the prompt was given as token ids; its text is then what they decode to.
    Otherwise tokens that the tokenizer has added, such as BOS, stand at the ends of the text.
    """
    before, inner = 0, list(token_ids)
    if text is not None:
        plain = tokenizer.encode(text, add_special_tokens=False)
        starts = range(len(token_ids) - len(plain) + 1)
        found = [i for i in starts if list(token_ids[i : i + len(plain)]) == plain]
        if found:
            before, inner = found[0], plain
    walk = TextOffsets(tokenizer, skip_special_tokens=False)
    walk.extend(inner)
    if text is None:
        return walk.offsets
    after = len(token_ids) - before - len(inner)
    offsets = [0] * before + walk.offsets + [len(text)] * after
    return [min(offset, len(text)) for offset in offsets]


def completion_logprobs(
    token_ids: Sequence[int],
    positions: Positions,
    offsets: Sequence[int],
    num_top: int,
    names: TokenNames,
) -> dict[str, list[Any]]:
    """Returns the four parallel lists over tokens that /v1/completions uses."""
    lists: dict[str, list[Any]] = {
        "text_offset": list(offsets),
        "token_logprobs": [],
        "tokens": [names.name(token_id, _BROKEN) for token_id in token_ids],
        "top_logprobs": [],
    }
    for token_id, entries in zip(token_ids, positions, strict=True):
        lists["token_logprobs"].append(None if entries is None else _finite(entries[token_id]))
        top = None if entries is None else _top_by_name(token_id, entries, num_top, names)
        lists["top_logprobs"].append(top)
    return lists


_BROKEN = "bytes:"


def _top_by_name(
    chosen: int, entries: dict[int, Logprob], num_top: int, names: TokenNames
) -> dict[str, float]:
    """Returns the most likely tokens and the chosen one by name.

    A name belongs to the chosen token, else to the most likely one; others of that name are named
    by their ids.
    """
    likeliest = _likeliest(entries, num_top)
    found: dict[str, float] = {}
    own = names.name(chosen, _BROKEN)
    for token_id in [*likeliest, *([] if chosen in likeliest else [chosen])]:
        name = names.name(token_id, _BROKEN)
        if name in found or (name == own and token_id != chosen):
            name = f"token_id:{token_id}"
        found[name] = _finite(entries[token_id])
    return found


def chat_logprobs(
    token_ids: Sequence[int], positions: Positions, num_top: int, names: TokenNames
) -> dict[str, list[Any]]:
    """Returns the entries of /v1/chat/completions, one per token."""

    def entry(token_id: int, entries: dict[int, Logprob]) -> dict[str, Any]:
        return {
            "token": names.name(token_id),
            "logprob": _finite(entries[token_id]),
            "bytes": names.bytes(token_id),
        }

    content = []
    for token_id, entries in zip(token_ids, positions, strict=True):
        assert entries is not None
        top = [entry(other, entries) for other in _likeliest(entries, num_top)]
        content.append({**entry(token_id, entries), "top_logprobs": top})
    return {"content": content}


def prompt_logprobs(output: RequestOutput) -> list[dict[str, dict[str, Any]] | None]:
    """Returns vLLM's extension: log-probabilities by token id for each token of the prompt."""
    return [
        None
        if entries is None
        else {str(token_id): _prompt_entry(entry) for token_id, entry in entries.items()}
        for entries in output.prompt_logprobs or []
    ]


def _prompt_entry(entry: Logprob) -> dict[str, Any]:
    return {"logprob": _finite(entry), "rank": entry.rank, "decoded_token": entry.decoded_token}


def _likeliest(entries: dict[int, Logprob], num_top: int) -> list[int]:
    """Returns the ids of the most likely tokens, in their order."""
    ranked = sorted(entries, key=lambda token_id: entries[token_id].rank)
    return [token_id for token_id in ranked if entries[token_id].rank <= num_top]


def _finite(entry: Logprob) -> float:
    return max(entry.logprob, LOWEST)
