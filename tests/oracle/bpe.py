"""BPE tokenizers, by the book and slowly, for text without special tokens.

`encode` is byte-level BPE with single digits (SmolLM's), `encode_by_score` SentencePiece's BPE.
"""

import unicodedata
from itertools import pairwise

_CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")


def encode(text: str, vocabulary: dict[str, int], merges: list[str]) -> list[int]:
    """The ids of a text; `merges` are "left right" in the order of their rank."""
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
    symbols = byte_symbols()
    ids = []
    for piece in split_digits(text):
        for word in split_words(piece):
            parts = [symbols[byte] for byte in word.encode()]
            ids += [vocabulary[part] for part in merge_word(parts, ranks)]
    return ids


def byte_symbols() -> list[str]:
    """The visible character that stands for each byte: itself, or one from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(b if b in visible else 0x100 + hidden.index(b)) for b in range(256)]


def split_digits(text: str) -> list[str]:
    """Cuts every numeric character out as a piece of its own."""
    pieces = [""]
    for char in text:
        if _kind(char) == "N":
            pieces += [char, ""]
        else:
            pieces[-1] += char
    return [piece for piece in pieces if piece]


def split_words(text: str) -> list[str]:
    """GPT-2's rule: contractions, then runs of one kind with at most one space before, then space.

    Of a run of white space before a word, the last character is left for the word.
    """
    words, start = [], 0
    while start < len(text):
        end = _word_end(text, start)
        words.append(text[start:end])
        start = end
    return words


def _word_end(text: str, start: int) -> int:
    for contraction in _CONTRACTIONS:
        if text.startswith(contraction, start):
            return start + len(contraction)
    first = start + 1 if text[start] == " " and start + 1 < len(text) else start
    kind = _kind(text[first])
    if kind != " ":
        return _run_end(text, first, kind)
    end = _run_end(text, start, " ")
    return end - 1 if end < len(text) and end - start > 1 else end


def _run_end(text: str, start: int, kind: str) -> int:
    while start < len(text) and _kind(text[start]) == kind:
        start += 1
    return start


def _kind(char: str) -> str:
    """L letter, N number, " " white space, else "?"."""
    category = unicodedata.category(char)[0]
    if category in "LN":
        return category
    return " " if char.isspace() and char not in "\x1c\x1d\x1e\x1f" else "?"


def merge_word(parts: list[str], ranks: dict[tuple[str, ...], int]) -> list[str]:
    """Joins the pair of the lowest rank, leftmost first, until no pair has one."""
    while True:
        pairs = [(ranks[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in ranks]
        if not pairs:
            return parts
        _, i = min(pairs)
        parts = [*parts[:i], parts[i] + parts[i + 1], *parts[i + 2 :]]


def encode_by_score(
    text: str, scores: dict[str, float], user_defined: str | None = None, *, prefix: str = ""
) -> list[str]:
    """The pieces of a text: merges by the score of the result, leftmost first; the rest is bytes.

    `user_defined` is a piece that is cut out of the normalized text first.
    """
    pieces = []
    normalized = (prefix + text).replace(" ", "▁")
    for i, part in enumerate(normalized.split(user_defined) if user_defined else [normalized]):
        pieces += [user_defined] * (i > 0)
        symbols = list(part)
        while True:
            joined = [left + right for left, right in pairwise(symbols)]
            found = [(-scores[piece], i) for i, piece in enumerate(joined) if piece in scores]
            if not found:
                break
            _, i = min(found)
            symbols[i : i + 2] = [joined[i]]
        for symbol in symbols:
            known = symbol in scores
            pieces += [symbol] if known else [f"<0x{byte:02X}>" for byte in symbol.encode()]
    return pieces
