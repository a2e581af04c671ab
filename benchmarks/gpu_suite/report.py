"""The suite's results as Markdown."""

from collections.abc import Sequence
from typing import Any

_NUMERICS = ("backend", "dtype", "width", "error", "limit", "passed", "skipped")
_BANDWIDTH = (
    "width",
    "batch",
    "lengths",
    "implementation",
    "layer_us",
    "bytes_per_second",
    "of_copy",
    "failed",
)
_PARALLEL = (
    "model",
    "devices",
    "equal",
    "strategy",
    "batch",
    "copies",
    "attention_ms",
    "rest_ms",
    "all_reduce_estimate_ms",
    "tokens_per_second",
    "tokens_per_second_over_static",
    "predicted_tokens_per_second_over_static",
)


def markdown(results: dict[str, Any]) -> str:
    """Every part that ran, as a table; parts that failed say why."""
    about = results["about"]
    lines = [f"# {about['device']}", ""]
    lines += [f"- {key}: {value}" for key, value in about.items()]
    for part in ("numerics", "bandwidth", "parallel", "demo"):
        if part not in results:
            continue
        result = results[part]
        lines += ["", f"## {part}", ""]
        if isinstance(result, dict) and "failed" in result:
            lines.append(f"failed: {result['failed']}")
        elif part == "numerics":
            lines += _table(_NUMERICS, result)
        elif part == "bandwidth":
            lines += [f"copy: {result['copy_bytes_per_second'] / 1e12:.3f} TB/s", ""]
            lines += _table(_BANDWIDTH, result["records"])
        elif part == "parallel":
            lines += ["Without the all-reduces, whose estimate stands apart.", ""]
            lines += _table(_PARALLEL, result)
        else:
            lines += [f"- {key}: {value}" for key, value in result.items()]
    return "\n".join(lines) + "\n"


def _table(columns: Sequence[str], records: Any) -> list[str]:
    columns = [column for column in columns if any(column in record for record in records)]
    rows = [[_cell(record.get(column, "")) for column in columns] for record in records]
    return [" | ".join(row) for row in (columns, ["---"] * len(columns), *rows)]


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")
