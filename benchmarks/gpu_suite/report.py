"""The suite's results as Markdown."""

from typing import Any

_NOTES = {"parallel": "Without the all-reduces, whose estimate stands apart."}


def markdown(results: dict[str, Any]) -> str:
    """Every part that ran, as a table."""
    about = results["about"]
    lines = [f"# {about['device']}", ""]
    lines += [f"- {key}: {value}" for key, value in about.items()]
    for part, records in results.items():
        if part != "about" and records:
            lines += ["", f"## {part}", ""]
            lines += [_NOTES[part], ""] if part in _NOTES else []
            lines += _table(records)
    return "\n".join(lines) + "\n"


def _table(records: list[dict[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(column for record in records for column in record))
    rows = [[_cell(record.get(column, "")) for column in columns] for record in records]
    return [" | ".join(row) for row in (columns, ["---"] * len(columns), *rows)]


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")
