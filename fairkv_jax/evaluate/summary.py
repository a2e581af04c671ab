"""What the rows of a sweep say: figures with intervals, and the smallest budget that is enough."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from fairkv_jax.evaluate.results import AFTER, FULL, IN_VIEW, PROTOCOLS, Row
from fairkv_jax.evaluate.statistics import Estimate, paired_difference, student, wilson
from fairkv_jax.evaluate.sweep import KL, NLL

NATS = (NLL, KL)
"""Tasks whose scores are nats per token: less is better."""
PROTOCOL_TEXTS = {IN_VIEW: "question in view", AFTER: "question after compression"}


@dataclass(frozen=True)
class Figure:
    """The score of a method in a task, at one ratio and in one protocol."""

    task: str
    method: str
    ratio: float | None
    question: str | None
    length: int | None
    """None: over all lengths."""
    kept: float
    score: Estimate
    difference: Estimate | None
    """Score less that of full on the same documents; None for full itself and for KL."""


@dataclass(frozen=True)
class Recommendation:
    """The smallest budget of a method whose loss against full is small enough."""

    method: str
    question: str
    ratio: float | None
    """None: every ratio that was measured loses more."""
    kept: float | None
    loss: Estimate | None
    """Mean loss of score over the tasks, in [0, 1]."""
    tasks: tuple[str, ...]


def figures(rows: Sequence[Row], *, by_length: bool) -> list[Figure]:
    """Returns the figures of all cells, or with `by_length` false, of cells over all lengths."""
    groups: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        length = row.length if by_length else None
        groups[row.task, row.method, row.ratio, row.question, length].append(row)
    baseline = _by_document(row for row in rows if row.method == FULL)
    return [_figure(key, group, baseline) for key, group in groups.items()]


def recommendations(rows: Sequence[Row], max_loss: float) -> list[Recommendation]:
    """Finds, by protocol and method, the smallest budget from which on the loss is small.

    The loss is the mean over tasks and lengths, at the documents that full was asked as well; nats
    do not count. The budget and all larger ones must lose at most `max_loss`.
    """
    scored = [row for row in rows if row.task not in NATS]
    baseline = _by_document(row for row in scored if row.method == FULL)
    methods = dict.fromkeys(row.method for row in scored if row.method != FULL)
    found = []
    for protocol in PROTOCOLS:
        for method in methods:
            mine = [row for row in scored if (row.method, row.question) == (method, protocol)]
            if mine:
                found.append(_recommend(method, protocol, mine, baseline, max_loss))
    return found


def depth_grid(
    rows: Iterable[Row], lengths: Sequence[int], num_bins: int
) -> list[list[float | None]]:
    """Returns mean scores [depth][length] of rows that have a depth; None where there is none."""
    cells: dict[tuple[int, int | None], list[float]] = defaultdict(list)
    for row in rows:
        if row.depth is not None:
            cells[min(int(row.depth * num_bins), num_bins - 1), row.length].append(row.score)
    return [
        [float(np.mean(cells[bin_, n])) if (bin_, n) in cells else None for n in lengths]
        for bin_ in range(num_bins)
    ]


def _recommend(
    method: str,
    protocol: str,
    rows: Sequence[Row],
    baseline: dict[tuple, float],
    max_loss: float,
) -> Recommendation:
    tasks = tuple(dict.fromkeys(row.task for row in rows))
    best: tuple[float, float, Estimate] | None = None
    for ratio in sorted({row.ratio for row in rows if row.ratio is not None}):
        mine = [row for row in rows if row.ratio == ratio]
        loss = _loss(_by_document(mine), baseline)
        if loss is None or loss.mean > max_loss + 1e-9:
            break
        best = ratio, float(np.mean([row.kept for row in mine])), loss
    ratio, kept, loss = best or (None, None, None)
    return Recommendation(method, protocol, ratio, kept, loss, tasks)


def _loss(scores: dict[tuple, float], baseline: dict[tuple, float]) -> Estimate | None:
    paired = [key for key in scores if key in baseline]
    if not paired:
        return None
    found = paired_difference([baseline[k] for k in paired], [scores[k] for k in paired])
    # Tasks weigh the same, however many documents they have.
    by_task: dict[str, list[float]] = defaultdict(list)
    for key in paired:
        by_task[key[0]].append(baseline[key] - scores[key])
    mean = float(np.mean([np.mean(losses) for losses in by_task.values()]))
    return Estimate(mean, found.low, found.high, found.n)


def _figure(key: tuple, rows: Sequence[Row], baseline: dict[tuple, float]) -> Figure:
    task, method, ratio, question, length = key
    by_document = _by_document(rows)
    interval: Callable[[Sequence[float]], Estimate] = student if task in NATS else wilson
    kept = float(np.mean([row.kept for row in rows]))
    score = interval(list(by_document.values()))
    paired = [document for document in by_document if document in baseline]
    difference = None
    if method != FULL and task != KL and paired:
        mine, full = [by_document[k] for k in paired], [baseline[k] for k in paired]
        if task == NLL:
            difference = student(np.subtract(mine, full).tolist())
        else:
            difference = paired_difference(mine, full)
    return Figure(task, method, ratio, question, length, kept, score, difference)


def _by_document(rows: Iterable[Row]) -> dict[tuple, float]:
    """Returns the mean scores of documents, which are independent where questions are not."""
    groups: dict[tuple, list[float]] = defaultdict(list)
    for row in rows:
        groups[row.task, row.length, row.seed, row.sample].append(row.score)
    return {key: float(np.mean(scores)) for key, scores in groups.items()}


def protocol_text(task: str, question: str | None) -> str:
    """Returns a protocol in words; empty for full, which has none."""
    if question is None:
        return ""
    if task in NATS:
        return "what follows a compressed context"
    return PROTOCOL_TEXTS[question]
