"""Haystacks: the texts in which the tasks hide what is asked for. Nothing is downloaded."""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_NOISE = ("The hill is steep.", "The lake is calm.", "The wind is cold.", "We walk on, and back.")
_SENTENCE = re.compile(r"(?<=[.!?] )[A-Z][A-Za-z ,;:'()\-]{30,220}[a-z]\.(?= )")


@dataclass(frozen=True)
class Haystack:
    """Sentences that fill a document around the needles."""

    name: str
    sentences: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """A hash of the sentences: results of other texts are not comparable."""
        return hashlib.sha256("\n".join(self.sentences).encode()).hexdigest()[:12]

    def take(self, count: int, chance: np.random.Generator) -> list[str]:
        """Returns `count` successive sentences from a random start on, around the text's end."""
        start = int(chance.integers(len(self.sentences)))
        return [self.sentences[(start + i) % len(self.sentences)] for i in range(count)]


def read_haystack(source: str) -> Haystack:
    """Returns the haystack "python" or "noise", or the sentences of a text file.

    "python" takes the plain sentences of the language reference that comes with the interpreter,
    about 7,600 words; it differs between versions of Python. "noise" repeats a few short sentences,
    as RULER's easiest haystack does.

    Raises:
        ValueError: the file is not UTF-8 text or contains no sentence, or this interpreter comes
            without its reference.
    """
    named = {"python": _python, "noise": lambda: _NOISE}
    read: Callable[[], tuple[str, ...]] = named.get(source) or (lambda: _of_file(source))
    return Haystack(source if source in named else Path(source).name, read())


def _python() -> tuple[str, ...]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ValueError(
            "this Python comes without its reference (pydoc_data), which is the haystack python: "
            "give --haystack noise, or the path of a text"
        ) from error
    text = re.sub(r"\s+", " ", " ".join(topics[name] for name in sorted(topics)))
    # Two dashes underline a heading.
    return tuple(dict.fromkeys(part for part in _SENTENCE.findall(text) if "--" not in part))


def _of_file(path: str) -> tuple[str, ...]:
    text = re.sub(r"\s+", " ", read_text(path, "--haystack"))
    sentences = tuple(part.strip() for part in re.split(r"(?<=[.!?]) ", text) if part.strip())
    if not sentences:
        raise ValueError(f"--haystack {path} contains no text")
    return sentences


def read_text(path: str, flag: str) -> str:
    """Reads a text file that a flag names.

    Raises:
        ValueError: there is no such file, or it is not UTF-8 text.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {flag} {path}: {error}") from error
