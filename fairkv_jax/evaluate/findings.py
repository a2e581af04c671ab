"""The conclusions of a sweep in words, which its reports share."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fairkv_jax.checkpoint.fetch import DEMO_MODEL
from fairkv_jax.evaluate.results import FULL, Row
from fairkv_jax.evaluate.summary import (
    NATS,
    PROTOCOL_TEXTS,
    Figure,
    Recommendation,
    figures,
    recommendations,
)
from fairkv_jax.evaluate.sweep import KL, NLL, SOLVED, Sweep, SweepPlan


@dataclass(frozen=True)
class Findings:
    """What the reports show."""

    title: str
    subtitle: str
    sweep_plan: SweepPlan
    rows: Sequence[Row]
    figures: Sequence[Figure]
    """By length."""
    max_loss: float
    recommendations: Sequence[Recommendation]
    unsolved: dict[tuple[str, int | None], float]
    notes: Sequence[str]

    @property
    def recommendation_lines(self) -> list[str]:
        return [_in_words(each, self.max_loss) for each in self.recommendations]

    @property
    def method_text(self) -> str:
        """How the figures were obtained."""
        plan = self.sweep_plan
        return (
            "Scores are recall in points of 100: the fraction of the expected answers that the "
            "greedy output contains. Their intervals are Wilson's, those of differences Agresti "
            "and Min's for pairs; nats have Student's. Documents count as independent, questions "
            f"about one document do not. Haystack: {plan.options.haystack.name}; seed "
            f"{plan.options.seed}; {plan.num_samples} documents per task and length."
        )


def find(sweep: Sweep, max_loss: float) -> Findings:
    """Draws the conclusions of a sweep that has run."""
    plan, unsolved = sweep.plan, sweep.unsolved()
    # Scores of tasks that even full does not solve say nothing, also if an earlier run had them.
    rows = [
        row for row in sweep.rows() if row.method == FULL or (row.task, row.length) not in unsolved
    ]
    advice = recommendations(rows, max_loss)
    name = _model_name(plan)
    return Findings(
        title=_title(name, advice, figures(rows, by_length=False), max_loss),
        subtitle=_subtitle(plan),
        sweep_plan=plan,
        rows=rows,
        figures=figures(rows, by_length=True),
        max_loss=max_loss,
        recommendations=advice,
        unsolved=unsolved,
        notes=[
            *_unsolved_in_words(unsolved),
            *(f"{what} was not served: {why}" for what, why in sweep.refused.items()),
        ],
    )


def panel_title(found: Sequence[Figure]) -> str:
    """States what a panel shows: the methods at the smallest kept fraction, best first."""
    compressed = [figure for figure in found if figure.method != FULL]
    if not compressed:
        return "Only the full cache was measured"
    ratio = max(figure.ratio or 0 for figure in compressed)
    last = [figure for figure in compressed if figure.ratio == ratio]
    is_nats = last[0].task in NATS
    last.sort(key=lambda figure: figure.score.mean, reverse=not is_nats)
    kept = f"With {1 - ratio:.0%} kept"
    unit = {NLL: "costs {:.2f} nats", KL: "is {:.2f} nats from full"}.get(last[0].task)

    def says(figure: Figure) -> str:
        if unit is None:
            return f"{figure.method} scores {100 * figure.score.mean:.0f}"
        value = figure.difference.mean if figure.difference else figure.score.mean
        return f"{figure.method} {unit.format(value)}"

    best, worst = says(last[0]), says(last[-1])
    return f"{kept}, {best}" if len(last) == 1 else f"{kept}, {best}, {worst}"


def _title(
    name: str, advice: Sequence[Recommendation], pooled: Sequence[Figure], max_loss: float
) -> str:
    """States the smallest budget that is enough, or the damage."""
    enough = [each for each in advice if each.kept is not None]
    if enough:
        best = min(enough, key=lambda each: each.kept or 1.0)
        assert best.loss is not None
        low, high = 100 * best.loss.low, 100 * best.loss.high
        return (
            f"With {best.kept:.0%} of its KV cache, {name} loses {100 * best.loss.mean:.1f} points "
            f"({low:.0f} to {high:.0f}): {best.method}, {PROTOCOL_TEXTS[best.question]}"
        )
    if advice:
        return f"{name} loses more than {100 * max_loss:g} points at every budget that was measured"
    losses = [figure for figure in pooled if figure.task == NLL and figure.difference]
    if losses:
        best = min(losses, key=lambda figure: (figure.kept, figure.score.mean))
        assert best.difference is not None
        return (
            f"{name} loses {best.difference.mean:.2f} nats per token with {best.kept:.0%} of its "
            f"cache, under {best.method}"
        )
    return f"{name} with its full cache"


def _subtitle(plan: SweepPlan) -> str:
    lengths = ", ".join(f"{length:,}" for length in plan.lengths)
    return f"Quality over the size of the KV cache; prompts of {lengths} tokens."


def _in_words(advice: Recommendation, max_loss: float) -> str:
    where = f"{advice.method}, {PROTOCOL_TEXTS[advice.question]}"
    tasks = ", ".join(advice.tasks)
    limit = f"{100 * max_loss:g} points"
    if advice.ratio is None or advice.loss is None:
        return f"{where}: every ratio that was measured loses more than {limit} on {tasks}."
    loss = advice.loss
    return (
        f"{where}: kv_ratio {advice.ratio:g} ({advice.kept:.0%} kept) is the smallest budget that "
        f"loses at most {limit} on {tasks}: {100 * loss.mean:.1f} points (95 % interval "
        f"{100 * loss.low:.1f} to {100 * loss.high:.1f}, {loss.n} documents)."
    )


def _unsolved_in_words(unsolved: dict[tuple[str, int | None], float]) -> list[str]:
    lines = []
    for task in dict.fromkeys(task for task, _ in unsolved):
        scores = [
            f"{100 * score:.0f}" + ("" if length is None else f" at {length:,} tokens")
            for (name, length), score in unsolved.items()
            if name == task
        ]
        lines.append(
            f"{task} is not compared where the full cache scores below {100 * SOLVED:.0f}: "
            f"{', '.join(scores)}."
        )
    return lines


def _model_name(plan: SweepPlan) -> str:
    source = str(plan.model.get("base_url") or plan.model.get("model") or DEMO_MODEL)
    return source if "://" in source else Path(source).stem
