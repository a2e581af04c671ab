"""The suite's results as Markdown."""

from typing import Any

from benchmarks.gpu_suite.strategies_table import strategies_table

_NOTES = {"parallel": "Without the all-reduces."}


def markdown(results: dict[str, Any]) -> str:
    """Every part that ran, as tables."""
    about = results["about"]
    lines = [f"# {about['device']}", ""]
    lines += [f"- {key}: {value}" for key, value in about.items()]
    for part, records in results.items():
        if part != "about" and records:
            lines += ["", f"## {part}", ""]
            lines += [_NOTES[part], ""] if part in _NOTES else []
            compared = [record for record in records if "strategy" in record]
            others = [record for record in records if "strategy" not in record]
            lines += [*strategies_table(compared), ""] if compared else []
            lines += _table(others) if others else []
    return "\n".join(lines).rstrip() + "\n"


def _table(records: list[dict[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(column for record in records for column in record))
    rows = [[_cell(record.get(column, "")) for column in columns] for record in records]
    return [" | ".join(row) for row in (columns, ["---"] * len(columns), *rows)]


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")
