"""The user's own questions, and passages of the user's own text."""

import json
from itertools import groupby
from typing import Any

from fairkv_jax.evaluate.documents import Document, Question
from fairkv_jax.evaluate.haystack import read_text

SCORED_TOKENS = 96
"""Tokens after a context whose likelihood is measured."""


def read_questions(path: str) -> list[Document]:
    """Reads JSON lines with the keys context, question and answer, a string or a list of them.

    An output that contains any of the answers is right. Successive lines with the same context are
    questions about one document.

    Raises:
        ValueError: the file cannot be read, a line is not such an object, or there is none.
    """
    lines = enumerate(read_text(path, "--questions").splitlines(), 1)
    records = [_record(path, number, line) for number, line in lines if line.strip()]
    if not records:
        raise ValueError(f"--questions {path} contains no question")
    return [
        Document(context, tuple(question for _, question in group))
        for context, group in groupby(records, key=lambda record: record[0])
    ]


def _record(path: str, number: int, line: str) -> tuple[str, Question]:
    try:
        record: Any = json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number} of {path} is not JSON: {error}") from error
    fields = record if isinstance(record, dict) else {}
    context, question, answer = (fields.get(key) for key in ("context", "question", "answer"))
    answers = [answer] if isinstance(answer, str) else answer
    if (
        not (isinstance(context, str) and context and isinstance(question, str))
        or not isinstance(answers, list)
        or not answers
        or not all(isinstance(each, str) and each for each in answers)
    ):
        raise ValueError(
            f"line {number} of {path} must be an object with the texts context and question, and "
            "with answer, a text or a list of texts"
        )
    text = f"\n\nQuestion: {question}\nAnswer:"
    return context, Question(text, tuple(answers), needs_all=False)


def passages(token_ids: list[int], length: int, count: int) -> list[list[int]]:
    """Returns `count` passages of a context and the tokens that follow it, spread over a text.

    A passage has `length` tokens of context, one more that is given, and `SCORED_TOKENS` whose
    likelihood is measured. Passages overlap if the text is short.

    Raises:
        ValueError: the text is shorter than one passage, or has fewer different ones.
    """
    size = length + 1 + SCORED_TOKENS
    room = len(token_ids) - size
    if room + 1 < count:
        raise ValueError(
            f"--text has {len(token_ids)} tokens, but {count} passages of {length} tokens and the "
            f"{SCORED_TOKENS + 1} that follow need {size + count - 1}: give a longer text, or "
            "lower --lengths or --num-samples"
        )
    starts = [room * i // max(1, count - 1) for i in range(count)]
    return [token_ids[start : start + size] for start in starts]
