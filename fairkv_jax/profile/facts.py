"""Texts with planted facts, from which head scores are learned.

    words of a text ──► a passage: the words, with four facts planted among them
    a fact          ──► a sentence for the passage, and a question that ends before its answer

The text is the Python language reference that every Python contains, or the user's own.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FACTS_PER_PASSAGE = 4

_CODES = tuple(str(number) for number in random.Random(0).sample(range(10, 100_000), 400))
_YEARS = tuple(map(str, range(1400, 2000)))
_WORDS = ("lantern", "harvest", "whistle", "compass", "thunder", "pebble", "ribbon", "anchor")
_COLOURS = ("green", "blue", "red", "yellow", "black", "white", "purple", "orange", "brown", "pink")
_FOODS = ("soup", "rice", "cheese", "pancakes", "apples", "bread", "noodles", "cake", "tomatoes")
_ANIMALS = ("parrot", "rabbit", "turtle", "goat", "horse", "snake", "donkey", "pigeon", "lizard")
_PLACES = ("Norway", "Kenya", "Brazil", "Canada", "Vietnam", "Greece", "Peru", "Egypt", "Nepal")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_JOBS = ("teacher", "farmer", "dentist", "pilot", "baker", "painter", "lawyer", "sailor", "nurse")
_TOOLS = ("hammer", "ladder", "shovel", "rope", "brush", "bucket", "kettle", "mirror", "basket")

_PATTERNS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Note that the door code of the {} house is", "Which code opens the door?", _CODES),
    ("The parcel for {} weighs exactly", "How heavy is the parcel?", _CODES),
    ("Locker {} can be opened with the combination", "Open the locker.", _CODES),
    ("The telephone extension of the {} office is", "Whom do I call?", _CODES),
    ("The bridge at {} was finished in the year", "When was it finished?", _YEARS),
    ("The password of the {} society is", "Say the password.", _WORDS),
    ("The boat that was named {} has a sail that is", "What colour is the sail?", _COLOURS),
    ("The walls of the {} room were painted", "Describe the walls.", _COLOURS),
    ("On Sundays the {} family always eats", "What is for lunch?", _FOODS),
    ("The animal that lives behind the {} barn is a", "Which animal is it?", _ANIMALS),
    ("Last winter the {} choir travelled to", "Where did they travel?", _PLACES),
    ("The {} market takes place every", "On which day is the market?", _DAYS),
    ("Before the war, Captain {} worked as a", "What was the captain's trade?", _JOBS),
    ("Under the {} staircase somebody left a", "What was left there?", _TOOLS),
)
"""The beginning of a sentence, with a place for a name; a question; and what may follow both."""
_NAMES = (
    *("Amber", "Birch", "Carver", "Dalton", "Ember", "Fenwick", "Garnet", "Hollis", "Ivory"),
    *("Jasper", "Keller", "Linden", "Marlow", "Nutmeg", "Orchard", "Porter", "Quarry", "Rowan"),
    *("Saddler", "Tanner", "Umber", "Vesper", "Willow", "Yarrow", "Zephyr", "Copper", "Heron"),
)


@dataclass(frozen=True)
class Fact:
    """A sentence that a passage contains, and a question about it."""

    beginning: str
    """The sentence up to the answer; the question's last words too."""
    question: str
    answer: str

    @property
    def asked(self) -> str:
        """What follows the passage, up to the answer."""
        return f"\n\n{self.question} {self.beginning}"


@dataclass(frozen=True)
class Passage:
    """A text and the facts that it contains."""

    text: str
    facts: tuple[Fact, ...]
    answers_at: tuple[int, ...]
    """The character at which each fact's answer begins in the text."""


def draw_facts(rng: random.Random) -> tuple[Fact, ...]:
    """Draws facts of different patterns about different names."""
    patterns = rng.sample(_PATTERNS, FACTS_PER_PASSAGE)
    names = rng.sample(_NAMES, FACTS_PER_PASSAGE)
    return tuple(
        Fact(beginning.format(name), question, rng.choice(answers))
        for (beginning, question, answers), name in zip(patterns, names, strict=True)
    )


def plant(words: Sequence[str], facts: Sequence[Fact], places: Sequence[float]) -> Passage:
    """Writes the facts' sentences among the words, each at a fraction in [0, 1] of the words."""
    order = sorted(range(len(facts)), key=lambda i: places[i])
    text, start, answers_at = "", 0, [0] * len(facts)
    for i in order:
        stop = int(places[i] * len(words))
        text += " ".join([*words[start:stop], facts[i].beginning, ""])
        answers_at[i] = len(text)
        text += f"{facts[i].answer}. "
        start = stop
    return Passage(text + " ".join(words[start:]), tuple(facts), tuple(answers_at))


def read_words(path: str | Path | None) -> list[str]:
    """Returns the words of a text file, or without one those of Python's language reference.

    Raises:
        ValueError: there are none.
    """
    if path is not None:
        words = Path(path).read_text(encoding="utf-8").split()
        if not words:
            raise ValueError(f"the haystack {path} contains no words: give a longer text")
        return words
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise ValueError(
            "this Python lacks its language reference (pydoc_data): give a text by --haystack"
        ) from None
    words = " ".join(topics[name] for name in sorted(topics)).split()
    return [word for word in words if any(letter.isalnum() for letter in word)]
