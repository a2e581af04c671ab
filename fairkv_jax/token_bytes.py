"""The bytes of single tokens, which need not be whole characters."""

import json
import re
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer as Backend

SENTENCEPIECE_SPACE = "\u2581"
"""The character that stands for a space in SentencePiece's vocabularies."""


class TokenBytes:
    """What each token of a vocabulary adds to a text, in UTF-8."""

    def __init__(self, backend: Backend):
        self._backend = backend
        self._known: dict[int, bytes] = {}

    def __getitem__(self, token_id: int) -> bytes:
        """Returns the bytes of a token; an id without a token has none."""
        if token_id not in self._known:
            self._known[token_id] = self._read(token_id)
        return self._known[token_id]

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids of control tokens, such as "<|im_end|>"."""
        added = self._backend.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    @cached_property
    def _added_ids(self) -> frozenset[int]:
        return frozenset(self._backend.get_added_tokens_decoder())

    @cached_property
    def _decoder_steps(self) -> dict[str, dict[str, Any]]:
        """The steps of the backend's decoder by type."""
        if self._backend.decoder is None:
            return {}
        decoder = json.loads(self._backend.decoder.__getstate__())
        return {step["type"]: step for step in decoder.get("decoders", [decoder])}

    def _read(self, token_id: int) -> bytes:
        piece, steps = self._backend.id_to_token(token_id), self._decoder_steps
        if piece is None:
            return b""
        if token_id in self._added_ids:
            return piece.encode()
        if "ByteLevel" in steps:
            if all(character in _BYTE_OF_CHARACTER for character in piece):
                return bytes(_BYTE_OF_CHARACTER[character] for character in piece)
            return piece.encode()
        if "ByteFallback" in steps and (found := re.fullmatch("<0x([0-9A-Fa-f]{2})>", piece)):
            return bytes.fromhex(found.group(1))
        if "ByteFallback" in steps or "Metaspace" in steps:
            return piece.replace(SENTENCEPIECE_SPACE, " ").encode()
        return self._backend.decode([token_id], skip_special_tokens=False).encode()


def _bytes_of_characters() -> dict[str, int]:
    """Returns the byte that each character of a byte-level vocabulary stands for, as in GPT-2.

    Printable bytes stand for themselves, and the others are the characters from 256 on, in order.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    shifted = {chr(256 + index): byte for index, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | shifted


_BYTE_OF_CHARACTER = _bytes_of_characters()
