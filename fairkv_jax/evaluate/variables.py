"""variable_tracking: a number is assigned to a variable, this variable to another, and so on."""

import numpy as np

from fairkv_jax.evaluate.documents import Document, Question, insert
from fairkv_jax.evaluate.sample import Sample

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
NAME_LETTERS = 3


def variable_tracking(sample: Sample, size: int) -> Document:
    """Chains of assignments; all variables that have a chain's number are asked for.

    A chain has `hops` + 1 variables, whose assignments stand in their order in the text. There are
    two chains, or as many as `questions_per_document` if they are more; those that a question does
    not ask for distract from the answer.
    """
    options, chance = sample.options, sample.chance
    num_chains = max(2, options.questions_per_document)
    names = _names(chance, num_chains * (options.hops + 1))
    numbers = chance.choice(np.arange(10_000, 100_000), num_chains, replace=False)
    needles, questions = [], []
    for index, number in enumerate(numbers):
        chain = names[index * (options.hops + 1) : (index + 1) * (options.hops + 1)]
        values = [str(number), *(f"VAR {name}" for name in chain[:-1])]
        depths = np.sort(chance.random(len(chain)))
        needles += [
            (float(depth), f"VAR {name} = {value}.")
            for depth, name, value in zip(depths, chain, values, strict=True)
        ]
        questions.append(_question(int(number), chain))
    sentences = options.haystack.take(size, chance)
    text, _ = insert(sentences, needles)
    return Document(text, tuple(questions[: options.questions_per_document]))


def _question(number: int, chain: list[str]) -> Question:
    return Question(
        f"\n\nQuestion: Find all variables that are assigned the value {number} in the text above, "
        f"directly or by way of other variables.\nAnswer: {len(chain)} variables are assigned the "
        f"value {number}: VAR",
        tuple(chain),
    )


def _names(chance: np.random.Generator, count: int) -> list[str]:
    """Returns different names of three letters."""
    found: dict[str, None] = {}
    while len(found) < count:
        letters = chance.choice(list(_LETTERS), NAME_LETTERS)
        found["".join(letters)] = None
    return list(found)
