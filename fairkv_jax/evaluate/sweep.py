"""Runs what is missing of a sweep: the full cache first, then every method at every ratio."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from fairkv_jax.evaluate.documents import Document
from fairkv_jax.evaluate.results import AFTER, FULL, IN_VIEW, Cell, Results, Row
from fairkv_jax.evaluate.runners import Answer, NotServed, Runner
from fairkv_jax.evaluate.tasks import TASKS, TaskOptions, make_document
from fairkv_jax.evaluate.user_data import passages

QUESTIONS, NLL, KL = "questions", "nll", "kl"
"""The tasks on the user's own data."""
SOLVED = 0.5
"""Score of the full cache below which a task is not run with other methods."""
_BATCH = 8
"""Documents whose questions are in one batch; what an interruption loses."""
_MAX_TOKENS = 48
"""Tokens of an answer to one of the user's questions."""
_SHOWN_CHARACTERS = 200


@dataclass(frozen=True)
class SweepPlan:
    """What is to be measured, and with what."""

    tasks: tuple[str, ...]
    """Names in `TASKS`."""
    methods: tuple[str, ...]
    """Besides full."""
    ratios: tuple[float, ...]
    protocols: tuple[str, ...]
    lengths: tuple[int, ...]
    num_samples: int
    options: TaskOptions
    model: dict[str, Any]
    """The model and the options that its answers depend on."""
    questions: tuple[Document, ...] = ()
    text: str | None = None

    def setup(self, task: str) -> dict[str, Any]:
        """Returns what the results of a task depend on, besides what stands in its rows."""
        if task == QUESTIONS:
            contents = repr(self.questions)
        elif task in (NLL, KL):
            contents = f"{self.num_samples} {self.text}"  # passages are spread over the text
        else:
            fixed = self.options
            contents = f"{fixed.haystack.fingerprint} {fixed.hops} {fixed.questions_per_document}"
        return {"model": self.model, "data": hash_of(contents)}

    def cells(self, method: str) -> list[Cell]:
        """Lists the figures that questions give for a method."""
        ratios = (None,) if method == FULL else self.ratios
        protocols = (None,) if method == FULL else self.protocols
        kinds: list[tuple[str, int | None]] = [
            (task, length) for task in self.tasks for length in self.lengths
        ]
        if self.questions:
            kinds.append((QUESTIONS, None))
        return [
            Cell(task, method, ratio, protocol, length)
            for task, length in kinds
            for protocol in protocols
            for ratio in ratios
        ]


def hash_of(value: Any) -> str:
    """Returns a short hash of a value that JSON can represent."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


@dataclass
class Sweep:
    """A sweep on its way; running it again goes on where it was interrupted."""

    plan: SweepPlan
    results: Results
    open_runner: Callable[[str], AbstractContextManager[Runner]]
    """Opens what runs a method."""
    show: bool = True
    refused: dict[str, str] = field(default_factory=dict)
    """Why cells were not served, by method and protocol."""
    _documents: dict[tuple[str, int | None, int], Document] = field(default_factory=dict)

    def run(self) -> None:
        """Runs everything that the results lack.

        Raises:
            ValueError: an option is invalid, or a prompt is too long for the model.
        """
        with tqdm(total=self._num_missing(), desc="documents", disable=not self.show) as bar:
            for method in (FULL, *self.plan.methods):
                self._run_method(method, bar)
                if method == FULL:
                    bar.total = bar.n + self._num_missing()
                    bar.refresh()

    def unsolved(self) -> dict[tuple[str, int | None], float]:
        """Returns full's scores below `SOLVED`, by task and length."""
        scores = {}
        for cell in self.plan.cells(FULL):
            rows = [row.score for row in self.rows() if row.cell == cell]
            if rows and np.mean(rows) < SOLVED:
                scores[cell.task, cell.length] = float(np.mean(rows))
        return scores

    def rows(self) -> list[Row]:
        """Returns the results that belong to this sweep."""
        plan = self.plan
        methods = (FULL, *plan.methods)
        cells = {cell for method in methods for cell in plan.cells(method)}
        cells |= {cell for method in methods for cell in self._likelihood_cells(method)}
        setups = {cell.task: hash_of(plan.setup(cell.task)) for cell in cells}
        return [
            row
            for row in self.results.rows.values()
            if row.cell in cells
            and row.setup == setups[row.task]
            and row.seed == plan.options.seed
            and row.sample < self._num_documents(row.task)
        ]

    def _run_method(self, method: str, bar: tqdm) -> None:
        cells = [cell for cell in self._cells(method) if self._missing(cell)]
        likelihoods = [c for c in self._likelihood_cells(method) if self._missing(c)]
        if not cells and not likelihoods:
            return
        bar.set_postfix_str(method)
        for cell in [*cells, *likelihoods]:
            setup = self.plan.setup(cell.task)
            self.results.add_setup(hash_of(setup), setup)
        with self.open_runner(method) as runner:
            for cell in cells:
                self._run_cell(runner, cell, bar)
            if likelihoods:
                self._run_likelihoods(runner, likelihoods, bar)

    def _cells(self, method: str) -> list[Cell]:
        """Lists a method's cells, without those that full does not solve."""
        cells = self.plan.cells(method)
        unsolved = {} if method == FULL else self.unsolved()
        return [cell for cell in cells if (cell.task, cell.length) not in unsolved]

    def _run_cell(self, runner: Runner, cell: Cell, bar: tqdm) -> None:
        missing = self._missing(cell)
        bar.set_postfix_str(" ".join(str(value) for value in vars(cell).values() if value))
        max_tokens = TASKS[cell.task].max_tokens if cell.task in TASKS else _MAX_TOKENS
        size = 1 if cell.question == AFTER else _BATCH
        for start in range(0, len(missing), size):
            batch = missing[start : start + size]
            documents = [self._document(runner, cell, sample) for sample in batch]
            try:
                if cell.question == AFTER:
                    answers = [runner.answer_after(documents[0], cell.ratio, max_tokens)]
                else:
                    answers = runner.answer_in_view(documents, cell.ratio, max_tokens)
            except NotServed as error:
                self.refused[f"{cell.method}, {cell.question or IN_VIEW}"] = str(error)
                bar.update(len(missing) - start)
                return
            for sample, document, answered in zip(batch, documents, answers, strict=True):
                self.results.add(self._rows_of(cell, sample, document, answered))
                bar.update()

    def _rows_of(
        self, cell: Cell, sample: int, document: Document, answers: Sequence[Answer]
    ) -> list[Row]:
        """Returns a document's rows; the first question's is the last one, see `_missing`."""
        rows = [
            self._row(
                cell,
                sample,
                question.score(answer.text),
                answer.kept,
                index=index,
                depth=question.depth,
                output=answer.text[:_SHOWN_CHARACTERS],
            )
            for index, (question, answer) in enumerate(
                zip(document.questions, answers, strict=True)
            )
        ]
        return rows[::-1]

    def _row(self, cell: Cell, sample: int, score: float, kept: float, **others: Any) -> Row:
        setup = hash_of(self.plan.setup(cell.task))
        place: dict[str, Any] = {"index": 0, **others}
        seed = self.plan.options.seed
        return Row(setup, **vars(cell), seed=seed, sample=sample, score=score, kept=kept, **place)

    def _run_likelihoods(self, runner: Any, cells: Sequence[Cell], bar: tqdm) -> None:
        """Measures NLL and KL of each passage at all ratios, which share the full distributions."""
        text = runner.encode(self.plan.text)
        for length in self.plan.lengths:
            contexts = passages(text, length, self.plan.num_samples)
            for sample, passage in enumerate(contexts):
                missing = [c for c in cells if c.length == length and sample in self._missing(c)]
                ratios = list(dict.fromkeys(cell.ratio for cell in missing))
                measured = dict(zip(ratios, runner.likelihoods(passage, ratios), strict=True))
                rows = []
                for cell in missing:
                    found = measured[cell.ratio]
                    score = found.nll if cell.task == NLL else found.kl
                    rows.append(self._row(cell, sample, score, found.kept))
                self.results.add(rows)
                bar.update(len(missing))

    def _likelihood_cells(self, method: str) -> list[Cell]:
        if self.plan.text is None:
            return []
        if method == FULL:
            return [Cell(NLL, FULL, None, None, length) for length in self.plan.lengths]
        return [
            Cell(task, method, ratio, AFTER, length)
            for task in (NLL, KL)
            for length in self.plan.lengths
            for ratio in self.plan.ratios
        ]

    def _num_documents(self, task: str) -> int:
        return len(self.plan.questions) if task == QUESTIONS else self.plan.num_samples

    def _missing(self, cell: Cell) -> list[int]:
        """Lists the documents without results.

        A document's first question is written last: if its row is there, so are the others.
        """
        setup, seed = hash_of(self.plan.setup(cell.task)), self.plan.options.seed
        samples = range(self._num_documents(cell.task))
        return [n for n in samples if (setup, cell, seed, n, 0) not in self.results.rows]

    def _num_missing(self) -> int:
        return sum(len(self._missing(cell)) for cell in self._all_cells())

    def _all_cells(self) -> Iterator[Cell]:
        for method in (FULL, *self.plan.methods):
            yield from self._cells(method)
            yield from self._likelihood_cells(method)

    def _document(self, runner: Runner, cell: Cell, sample: int) -> Document:
        if cell.task == QUESTIONS:
            return self.plan.questions[sample]
        key = (cell.task, cell.length, sample)
        if key not in self._documents:
            assert cell.length is not None
            self._documents[key] = make_document(
                cell.task, self.plan.options, sample, cell.length, runner.count_tokens
            )
        return self._documents[key]
