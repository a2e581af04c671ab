"""What the documents of the synthetic tasks are made from."""

from dataclasses import dataclass

import numpy as np

from fairkv_jax.evaluate.haystack import Haystack


@dataclass(frozen=True)
class TaskOptions:
    """What the documents of all tasks depend on, besides their length."""

    haystack: Haystack
    seed: int = 0
    hops: int = 4
    """Assignments in a chain of variable_tracking after its first one."""
    questions_per_document: int = 1
    """How many of a document's needles or chains are asked for, where there are several."""


@dataclass(frozen=True)
class Sample:
    """What one document is made from."""

    options: TaskOptions
    chance: np.random.Generator
    depth: float
    """Where the needle of the first question is to stand, in [0, 1]."""
