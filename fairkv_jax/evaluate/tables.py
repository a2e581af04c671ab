"""The figures of a sweep as JSON and as the rows of a table."""

import json
from dataclasses import asdict
from typing import Any

from fairkv_jax.evaluate.findings import Findings
from fairkv_jax.evaluate.statistics import Estimate
from fairkv_jax.evaluate.summary import NATS, Figure, protocol_text

TABLE_HEAD = (
    "task", "protocol", "length", "method", "kept", "score", "95 % interval",
    "difference to full", "95 % interval", "documents",
)  # fmt: skip


def as_json(findings: Findings) -> str:
    """Returns the figures, recommendations and notes as JSON; an unbounded interval is null."""
    record = {
        "title": findings.title,
        "model": findings.sweep_plan.model,
        "figures": [asdict(figure) for figure in findings.figures],
        "max_loss": findings.max_loss,
        "recommendations": [asdict(each) for each in findings.recommendations],
        "unsolved": [
            {"task": task, "length": length, "full": score}
            for (task, length), score in findings.unsolved.items()
        ],
        "notes": findings.notes,
    }
    return json.dumps(_finite(record), indent=2) + "\n"


def table_cells(figure: Figure) -> list[str]:
    """Returns one figure as the cells of a table's row."""
    is_nats = figure.task in NATS
    difference = figure.difference
    return [
        figure.task,
        protocol_text(figure.task, figure.question) or "-",
        "own" if figure.length is None else f"{figure.length:,}",
        figure.method,
        f"{figure.kept:.1%}",
        _value(figure.score.mean, is_nats),
        _interval(figure.score, is_nats),
        "-" if difference is None else _value(difference.mean, is_nats, sign="+"),
        "-" if difference is None else _interval(difference, is_nats, sign="+"),
        str(figure.score.n),
    ]


def _value(value: float, is_nats: bool, sign: str = "") -> str:
    return f"{value:{sign}.3f} nats" if is_nats else f"{100 * value:{sign}.1f}"


def _interval(estimate: Estimate, is_nats: bool, sign: str = "") -> str:
    if abs(estimate.low) == float("inf"):
        return "-"
    if is_nats:
        return f"{estimate.low:{sign}.3f} to {estimate.high:{sign}.3f}"
    return f"{100 * estimate.low:{sign}.1f} to {100 * estimate.high:{sign}.1f}"


def _finite(value: Any) -> Any:
    """Replaces infinities, which JSON does not have, by None."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and abs(value) == float("inf") else value
