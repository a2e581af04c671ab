"""Aggregation tasks: lists of words, of which the most frequent ones are asked for."""

import numpy as np
from scipy.special import zeta

from fairkv_jax.evaluate.documents import Document, Question
from fairkv_jax.evaluate.sample import Sample

NUM_COMMON = 10
"""Words that common_words asks for, as in RULER."""
_FREQUENCIES = ((30, 3), (10, 1), (3, 1))
"""How often a common and another word occur: RULER's, and fewer where the list is short."""
NUM_FREQUENT = 3
"""Words that frequent_words asks for, as in RULER."""
ZETA_EXPONENT = 2.0
_SYLLABLES = (
    "ba", "be", "bi", "bo", "da", "de", "di", "do", "fa", "fi", "ka", "ki", "ko", "la", "le",
    "lo", "ma", "me", "mi", "na", "ni", "po", "ra", "re", "ro", "sa", "ta", "to",
)  # fmt: skip


def common_words(sample: Sample, size: int) -> Document:
    """A numbered list of about `size` words; ten of them occur ten times as often as the others."""
    frequent, rare = next(
        pair for pair in _FREQUENCIES if 2 * NUM_COMMON * pair[0] <= size or pair[0] == 3
    )
    num_others = max(1, (size - NUM_COMMON * frequent) // rare)
    words = _words(sample.chance, NUM_COMMON + num_others)
    common, others = words[:NUM_COMMON], words[NUM_COMMON:]
    entries = [*common * frequent, *others * rare]
    listed = [entries[i] for i in sample.chance.permutation(len(entries))]
    text = "Below is a numbered list of words. Some of them appear more often than others.\n"
    text += " ".join(f"{number}. {word}" for number, word in enumerate(listed, 1))
    question = (
        f"\n\nQuestion: What are the {NUM_COMMON} most common words in the above list?\n"
        f"Answer: The top {NUM_COMMON} words that appear most often in the list are: 1."
    )
    return Document(text, (Question(question, tuple(common)),))


def frequent_words(sample: Sample, size: int) -> Document:
    """About `size` coded words in random order, with the frequencies of a zeta distribution.

    As in RULER, the most frequent word is noise ("..."), and the next three are asked for.
    """
    ranks = np.arange(1, int(size**0.5) + 1)
    counts = (size * ranks**-ZETA_EXPONENT / zeta(ZETA_EXPONENT)).astype(int)
    words = ["...", *_words(sample.chance, len(ranks) - 1)]
    coded = [word for word, count in zip(words, counts, strict=True) for _ in range(count)]
    text = (
        "Read the following coded text and track the frequency of each coded word. Ignore the dots "
        "'...'.\n"
    )
    text += " ".join(coded[i] for i in sample.chance.permutation(len(coded)))
    question = (
        f"\n\nQuestion: Which are the {NUM_FREQUENT} most frequently appearing words in the above "
        f"coded text?\nAnswer: The {NUM_FREQUENT} most frequently appearing words are"
    )
    return Document(text, (Question(question, tuple(words[1 : NUM_FREQUENT + 1])),))


def _words(chance: np.random.Generator, count: int) -> list[str]:
    """Returns different made-up words of three syllables; none is a part of another."""
    syllables = len(_SYLLABLES)
    codes = chance.choice(syllables**3, count, replace=False)
    return [
        "".join(_SYLLABLES[code // syllables**place % syllables] for place in range(3))
        for code in codes.tolist()
    ]
