"""Writes what a sweep has found: results.json, report.md and a self-contained report.html."""

from pathlib import Path

from fairkv_jax.evaluate.findings import Findings, find
from fairkv_jax.evaluate.page import report_page
from fairkv_jax.evaluate.sweep import Sweep
from fairkv_jax.evaluate.tables import TABLE_HEAD, as_json, table_cells


def write_report(sweep: Sweep, max_loss: float, folder: Path) -> None:
    """Writes the three files, and prints the conclusions.

    Args:
        max_loss: Loss of score, in [0, 1], that a recommended budget may cost.
    """
    findings = find(sweep, max_loss)
    (folder / "results.json").write_text(as_json(findings), encoding="utf-8")
    (folder / "report.md").write_text(as_markdown(findings), encoding="utf-8")
    (folder / "report.html").write_text(report_page(findings), encoding="utf-8")
    for line in [findings.title, *findings.recommendation_lines, *findings.notes]:
        print(line)
    print(f"report written to {folder / 'report.html'}")


def as_markdown(findings: Findings) -> str:
    """Returns the conclusions and a table of all figures."""
    lines = [f"# {findings.title}", "", findings.subtitle, ""]
    lines += [f"- {line}" for line in [*findings.recommendation_lines, *findings.notes]]
    lines += ["", f"| {' | '.join(TABLE_HEAD)} |", f"|{'---|' * len(TABLE_HEAD)}"]
    lines += [f"| {' | '.join(table_cells(figure))} |" for figure in findings.figures]
    return "\n".join([*lines, "", findings.method_text, ""])
