"""A runner without a model: it finds answers that stand in what a method keeps."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from fairkv_jax.evaluate.documents import Document
from fairkv_jax.evaluate.haystack import Haystack
from fairkv_jax.evaluate.results import PROTOCOLS
from fairkv_jax.evaluate.runners import Answer, NotServed
from fairkv_jax.evaluate.sample import TaskOptions
from fairkv_jax.evaluate.sweep import SweepPlan

HAYSTACK = Haystack("made up", tuple(f"Sentence {n} is here." for n in range(50)))


class ScriptedRunner:
    """Knows the kept end of every document. `budget` documents are answered, then it fails."""

    def __init__(self, method: str, log: list[tuple], budget: float = float("inf")):
        self.method, self.log, self.budget = method, log, budget

    def count_tokens(self, text: str) -> int:
        return len(text.split())

    def answer_in_view(
        self, documents: Sequence[Document], ratio: float | None, max_tokens: int
    ) -> list[list[Answer]]:
        return [self._answer(document, ratio, "in_view") for document in documents]

    def answer_after(
        self, document: Document, ratio: float | None, max_tokens: int
    ) -> list[Answer]:
        if self.method == "snapkv":
            raise NotServed("kv_policy snapkv looks at the end")
        return self._answer(document, ratio, "after")

    def _answer(self, document: Document, ratio: float | None, protocol: str) -> list[Answer]:
        if len(self.log) >= self.budget:
            raise KeyboardInterrupt
        self.log.append((self.method, ratio, protocol, document.text))
        start = int(len(document.text) * (ratio or 0))
        return [Answer(document.text[start:], 1 - (ratio or 0)) for _ in document.questions]


def opener(log: list[tuple], budget: float = float("inf")):
    @contextmanager
    def open_runner(method: str) -> Iterator[ScriptedRunner]:
        yield ScriptedRunner(method, log, budget)

    return open_runner


def make_plan(**changes) -> SweepPlan:
    fields = {
        "tasks": ("niah_single", "niah_multikey"),
        "methods": ("streaming_llm",),
        "ratios": (0.1, 0.5),
        "protocols": PROTOCOLS,
        "lengths": (150, 300),
        "num_samples": 10,
        "options": TaskOptions(HAYSTACK, questions_per_document=2),
        "model": {"model": "some/model.gguf"},
    }
    return SweepPlan(**{**fields, **changes})
