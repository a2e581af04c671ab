"""Retrieval tasks: sentences with secret numbers are hidden in a haystack (needles).

Of RULER's variants these are: a single needle; several keys, of which one is asked for; one key
with several values; and several keys that are all asked for in one question.
"""

import numpy as np

from fairkv_jax.evaluate.documents import Document, Question, insert
from fairkv_jax.evaluate.sample import Sample

NUM_NEEDLES = 4
"""Needles of the tasks that have several, as in RULER."""
_NAMES = (
    "Alice", "Arthur", "Bruno", "Clara", "Daniel", "Diana", "Edward", "Emma", "Felix", "Fiona",
    "George", "Grace", "Henry", "Helen", "Isaac", "Irene", "Jacob", "Julia", "Kevin", "Laura",
    "Lucas", "Maria", "Martin", "Nora", "Oliver", "Olivia", "Oscar", "Paula", "Peter", "Rachel",
    "Robert", "Sarah", "Simon", "Sophia", "Thomas", "Ursula", "Victor", "Vera", "Walter",
    "Wendy",
)  # fmt: skip
_ASK = "\n\nQuestion: complete the sentence from the text above.\nAnswer: "


def single(sample: Sample, size: int) -> Document:
    """One needle, whose number is asked for."""
    return _with_keys(sample, size, 1)


def multikey(sample: Sample, size: int) -> Document:
    """Needles of the same form with different names; the number of one name is asked for.

    As many of them as `questions_per_document` are asked for, each by a question of its own.
    """
    return _with_keys(sample, size, NUM_NEEDLES)


def multivalue(sample: Sample, size: int) -> Document:
    """Several needles of one name; all numbers are asked for at once."""
    (name,), numbers = _keys(sample.chance, 1), _numbers(sample.chance, NUM_NEEDLES)
    needles = [f"One of the secret numbers for {name} is {number}." for number in numbers]
    text, _ = _hide(sample, size, needles, _spread(sample.chance, NUM_NEEDLES))
    question = (
        f"\n\nQuestion: What are all {NUM_NEEDLES} secret numbers for {name} that are mentioned in "
        f"the text above?\nAnswer: The secret numbers for {name} are"
    )
    return Document(text, (Question(question, numbers),))


def multiquery(sample: Sample, size: int) -> Document:
    """Needles of different names; the numbers of all of them are asked for at once."""
    names, numbers = _keys(sample.chance, NUM_NEEDLES), _numbers(sample.chance, NUM_NEEDLES)
    needles = [_needle(*pair) for pair in zip(names, numbers, strict=True)]
    text, _ = _hide(sample, size, needles, _spread(sample.chance, NUM_NEEDLES))
    listed = f"{', '.join(names[:-1])} and {names[-1]}"
    question = (
        f"\n\nQuestion: What are the secret numbers for {listed} that are mentioned in the text "
        f"above?\nAnswer: The secret number for {names[0]} is"
    )
    return Document(text, (Question(question, numbers),))


def _with_keys(sample: Sample, size: int, count: int) -> Document:
    """Hides `count` needles, of which the first ones are asked for."""
    names, numbers = _keys(sample.chance, count), _numbers(sample.chance, count)
    needles = [_needle(*pair) for pair in zip(names, numbers, strict=True)]
    # The other needles are as far from the first one, and from one another, as they can be.
    depths = [(sample.depth + i / count) % 1 for i in range(count)]
    text, actual = _hide(sample, size, needles, depths)
    asked = min(count, sample.options.questions_per_document)
    questions = [
        Question(f"{_ASK}The secret number for {name} is", (number,), depth)
        for name, number, depth in zip(names, numbers, actual, strict=True)
    ]
    return Document(text, tuple(questions[:asked]))


def _needle(name: str, number: str) -> str:
    return f"The secret number for {name} is {number}."


def _hide(
    sample: Sample, size: int, needles: list[str], depths: list[float]
) -> tuple[str, list[float]]:
    """Hides the needles among `size` sentences; returns the text and the actual depths."""
    sentences = sample.options.haystack.take(size, sample.chance)
    return insert(sentences, list(zip(depths, needles, strict=True)))


def _keys(chance: np.random.Generator, count: int) -> list[str]:
    return [str(name) for name in chance.choice(_NAMES, count, replace=False)]


def _numbers(chance: np.random.Generator, count: int) -> tuple[str, ...]:
    """Returns different numbers of three digits, which most tokenizers keep apart."""
    return tuple(
        str(number) for number in chance.choice(np.arange(100, 1000), count, replace=False)
    )


def _spread(chance: np.random.Generator, count: int) -> list[float]:
    """Returns one random depth in each of `count` equal parts of the text."""
    return [(i + float(chance.random())) / count for i in range(count)]
