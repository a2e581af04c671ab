"""Synthetic long-context tasks of RULER (Hsieh et al., arXiv 2404.06654), made by code.

    needles    niah_single, niah_multikey, niah_multivalue, niah_multiquery    retrieval
    chains     variable_tracking                                               multi-hop tracing
    words      common_words, frequent_words                                    aggregation

The prompts are plain texts that the model completes, so that base models and small ones can answer.
The same seed and sample give the same needles at every length and for every method.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fairkv_jax.evaluate.documents import Document, fit
from fairkv_jax.evaluate.needles import multikey, multiquery, multivalue, single
from fairkv_jax.evaluate.sample import Sample, TaskOptions
from fairkv_jax.evaluate.variables import variable_tracking
from fairkv_jax.evaluate.words import common_words, frequent_words

_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Task:
    """A way to make documents."""

    make: Callable[[Sample, int], Document]
    """Makes a document of that many sentences or words."""
    max_tokens: int
    """Tokens that an answer may take."""
    smallest: int = 1
    """Fewest sentences or words."""
    has_depth: bool = False
    """Whether an answer stands in one place, whose depth is recorded."""


TASKS: dict[str, Task] = {
    "niah_single": Task(single, 12, has_depth=True),
    "niah_multikey": Task(multikey, 12, has_depth=True),
    "niah_multivalue": Task(multivalue, 40),
    "niah_multiquery": Task(multiquery, 64),
    "variable_tracking": Task(variable_tracking, 48),
    "common_words": Task(common_words, 96, smallest=60),
    "frequent_words": Task(frequent_words, 40, smallest=60),
}


def make_document(
    name: str, options: TaskOptions, index: int, num_tokens: int, count_tokens: Callable[[str], int]
) -> Document:
    """Makes the document of a task and sample, whose prompts have at most `num_tokens` tokens.

    The depths of successive samples are spread evenly, however many there are (multiples of the
    golden ratio).

    Raises:
        ValueError: the task does not fit into so few tokens.
    """
    task, seeds = TASKS[name], [options.seed, index, zlib.crc32(name.encode())]
    depth = (index * _GOLDEN) % 1

    def make(size: int) -> Document:
        return task.make(Sample(options, np.random.default_rng(seeds), depth), size)

    return fit(make, num_tokens, count_tokens, smallest=task.smallest)
