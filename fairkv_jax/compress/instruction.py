"""The texts by which KVzip lets the model repeat a prompt, part by part."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from fairkv_jax.tokenizer import Tokenizer

PART_TOKENS = 2048
"""Tokens of the prompt that are repeated at a time."""
_FIRST = "\n\nRepeat the previous context exactly."
_LATER = "\n\nRepeat the part of the previous context exactly, starting with"
_CONTEXT_TOKENS = 8
"""Last tokens of the part before, with which a later instruction ends."""
_SEPARATOR = "#####"


@dataclass(frozen=True)
class RepetitionPart:
    """The repetition of the tokens [start, stop) of a prompt."""

    start: int
    stop: int
    token_ids: list[int]
    """The instruction, what ends a user's turn, and the tokens themselves."""


@dataclass(frozen=True)
class RepeatInstruction:
    """The instructions as token ids; each part of a text is tokenised on its own."""

    first: tuple[int, ...]
    later: tuple[int, ...]
    """Without the tokens of the part before."""
    suffix: tuple[int, ...]
    """What comes between the instruction and the prompt's own tokens."""

    @classmethod
    def of(cls, tokenizer: Tokenizer, suffix: str | None = None) -> Self:
        """Tokenises the instructions; `suffix` replaces the end of a user's turn."""
        text = end_of_turn(tokenizer) if suffix is None else suffix
        return cls(
            *(
                tuple(tokenizer.encode(each, add_special_tokens=False))
                for each in (_FIRST, _LATER, text)
            )
        )

    def parts(self, token_ids: Sequence[int]) -> list[RepetitionPart]:
        """Returns the repetitions of a prompt."""
        parts = []
        for start in range(0, len(token_ids), PART_TOKENS):
            stop = min(start + PART_TOKENS, len(token_ids))
            before = token_ids[max(0, start - _CONTEXT_TOKENS) : start]
            instruction = [*self.later, *before] if start else self.first
            repeated = [*instruction, *self.suffix, *token_ids[start:stop]]
            parts.append(RepetitionPart(start, stop, repeated))
        return parts

    def part_lengths(self, num_tokens: int) -> tuple[int, ...]:
        """Returns the tokens of each repetition of a prompt of that length."""
        return tuple(len(part.token_ids) for part in self.parts(range(num_tokens)))

    def max_part_length(self, num_tokens: int) -> int:
        """Returns the most tokens of a repetition of prompts of at most that length."""
        instruction = max(len(self.first), len(self.later) + _CONTEXT_TOKENS)
        return instruction + len(self.suffix) + min(num_tokens, PART_TOKENS)


def end_of_turn(tokenizer: Tokenizer) -> str:
    """Returns what the chat template writes between a user's message and the answer.

    That is a newline where there is no template.
    """
    if not tokenizer.has_chat_template:
        return "\n"
    messages = [{"role": "user", "content": f"context\n{_SEPARATOR}"}]
    # An empty thought, where the template knows them, belongs to the end of the turn.
    text = tokenizer.apply_chat_template(messages, enable_thinking=False)
    return text.rpartition(_SEPARATOR)[2]
