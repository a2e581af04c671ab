"""Documents and the questions about them, and how an answer is scored."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """A question whose answer stands in a document."""

    text: str
    """What follows the document in the prompt; the model completes it."""
    answers: tuple[str, ...]
    depth: float | None = None
    """Where the answer stands: 0 at the document's beginning, 1 at its end; None: in many places.
    """
    needs_all: bool = True
    """Whether every answer must be given; else any one of them will do."""

    def score(self, output: str) -> float:
        """Returns the fraction of the answers that the output contains, ignoring case.

        That is the recall of RULER (arXiv 2404.06654). If any answer will do, it is 0 or 1.
        """
        found = [answer.lower() in output.lower() for answer in self.answers]
        return sum(found) / len(found) if self.needs_all else float(any(found))


@dataclass(frozen=True)
class Document:
    """A text, and questions about it that can share its compressed cache."""

    text: str
    questions: tuple[Question, ...]


def fit(
    make: Callable[[int], Document],
    num_tokens: int,
    count_tokens: Callable[[str], int],
    *,
    smallest: int,
) -> Document:
    """Returns the largest document that, with any of its questions, has at most `num_tokens`.

    Args:
        make: Makes the document with that many sentences or words.
        smallest: The smallest number that `make` takes.

    Raises:
        ValueError: not even the smallest document is short enough.
    """

    def tokens(size: int) -> int:
        document = make(size)
        return count_tokens(document.text) + max(count_tokens(q.text) for q in document.questions)

    low, high = smallest, 2 * smallest
    if (least := tokens(low)) > num_tokens:
        raise ValueError(
            f"a length of {num_tokens} tokens is too short for this task, whose smallest prompt "
            f"has {least}: raise --lengths"
        )
    while tokens(high) <= num_tokens:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if tokens(middle) <= num_tokens else (low, middle)
    return make(low)


def insert(
    sentences: Sequence[str], needles: Sequence[tuple[float, str]]
) -> tuple[str, list[float]]:
    """Puts each needle behind the sentence at its depth; returns the text and the actual depths.

    The depth of a needle is the position of its first character, divided by that of a needle at
    the very end.
    """
    places = sorted(
        (round(depth * len(sentences)), index) for index, (depth, _) in enumerate(needles)
    )
    parts, starts, at, length = [], [0] * len(needles), 0, 0
    for place, index in [*places, (len(sentences), -1)]:
        for sentence in sentences[at:place]:
            parts.append(sentence)
            length += len(sentence) + 1
        at = place
        if index >= 0:
            starts[index] = length
            parts.append(needles[index][1])
            length += len(needles[index][1]) + 1
    ends = [length - len(needle) - 1 for _, needle in needles]
    depths = [start / end if end else 0.0 for start, end in zip(starts, ends, strict=True)]
    return " ".join(parts), depths
