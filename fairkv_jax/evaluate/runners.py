"""What answers the questions of a sweep, with one compression method."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from fairkv_jax.evaluate.documents import Document


@dataclass(frozen=True)
class Answer:
    """What a model wrote after a question."""

    text: str
    kept: float
    """Fraction of the tokens that a head keeps on average, of what was compressed."""


class NotServed(ValueError):
    """The runner cannot run this method or protocol; others may go on."""


class Runner(Protocol):
    """One method on one model; decoding is greedy."""

    def count_tokens(self, text: str) -> int:
        """Returns the number of tokens of a text, with the special tokens of a prompt."""
        ...

    def answer_in_view(
        self, documents: Sequence[Document], ratio: float | None, max_tokens: int
    ) -> list[list[Answer]]:
        """Answers all questions, each in one prompt with its document, compressed together.

        Raises:
            ValueError: a prompt is too long, or the options are invalid.
            NotServed: see there.
        """
        ...

    def answer_after(
        self, document: Document, ratio: float | None, max_tokens: int
    ) -> list[Answer]:
        """Compresses a document, and answers its questions over the compressed cache.

        Raises:
            ValueError: a prompt is too long, or the options are invalid.
            NotServed: see there.
        """
        ...
