"""The report as a self-contained HTML page: conclusions, curves, heat maps and a table."""

import json
from collections.abc import Sequence
from html import escape

from fairkv_jax.evaluate.charts import Line, Point, curves, heat_map, marker, svg
from fairkv_jax.evaluate.findings import Findings, panel_title
from fairkv_jax.evaluate.results import FULL, PROTOCOLS, Row
from fairkv_jax.evaluate.summary import (
    NATS,
    PROTOCOL_TEXTS,
    Figure,
    Recommendation,
    depth_grid,
    figures,
    protocol_text,
)
from fairkv_jax.evaluate.sweep import KL, NLL
from fairkv_jax.evaluate.tables import TABLE_HEAD, as_json, table_cells

_DEPTH_BINS = 5
_STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5d6675; --line: #d9dee6;
  --paper: #ffffff; --panel: #f5f7fa; --heat: #1f5fbf; --cell: #e9eef5; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #9aa4b2; --line: #333b47;
  --paper: #14181f; --panel: #1c222b; --heat: #6aa5ff; --cell: #232b36; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1240px; margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .4rem; max-width: 34em; text-wrap: balance; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .25rem; }
h3 { font-size: .95rem; line-height: 1.35; margin: 0; text-wrap: balance; }
p { margin: .25rem 0 .75rem; max-width: 80ch; } .soft { color: var(--soft); font-size: .9rem; }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.5rem; margin: 1rem 0; }
.legend span { display: inline-flex; align-items: center; gap: .4rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr));
  gap: 1.25rem; margin: 1rem 0; }
.panel { background: var(--panel); border-radius: 8px; padding: .9rem 1rem; }
.panel .soft { margin: .1rem 0 .6rem; } .maps { display: flex; flex-wrap: wrap;
  gap: .5rem 2rem; margin: 0 0 1.25rem; } .maps p { margin: 0 0 .1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; } th { font-weight: 600; color: var(--soft); }
th:nth-child(-n+4), td:nth-child(-n+4) { text-align: left; }
.budgets { font-size: .95rem; } .budgets td { padding-right: 2rem; }
svg { display: block; max-width: 100%; height: auto; } .panel > svg { width: 100%; }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft); } svg .grid { stroke: var(--line); }
svg .towards { stroke-width: 1.2; stroke-dasharray: 1.5 4; opacity: .7; }
svg .full { stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: 5 4; }
svg text.name, svg text.dark { fill: var(--ink); font-weight: 600; }
svg .cell { fill: var(--cell); } svg .heat { fill: var(--heat); }
svg text.light { fill: var(--paper); font-weight: 600; }
"""


def report_page(findings: Findings) -> str:
    """Returns the page; the figures are also in it as JSON, in the element `figures`."""
    styles = {name: index for index, name in enumerate(findings.sweep_plan.methods)}
    body = [
        f"<h1>{escape(findings.title)}</h1>",
        f'<p class="soft">{escape(findings.subtitle)}</p>',
        _budgets(findings),
        "".join(f'<p class="soft">{escape(note)}</p>' for note in findings.notes),
        "<h2>Quality over the kept fraction of the cache</h2>",
        _legend(styles),
        _panels(findings, styles),
        _heat_maps(findings),
        "<h2>All figures</h2>",
        _table(findings),
        f'<p class="soft">{escape(findings.method_text)}</p>',
        _data(findings),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(findings.title)}</title><style>{_STYLE}</style></head>\n<body>"
        + "\n".join(body)
        + "</body></html>\n"
    )


def _budgets(findings: Findings) -> str:
    """Draws the recommended budgets, a row per method and a column per protocol."""
    found = {(each.method, each.question): each for each in findings.recommendations}
    if not found:
        return ""
    protocols = [name for name in PROTOCOLS if any(question == name for _, question in found)]
    head = "".join(f"<th>{PROTOCOL_TEXTS[name]}</th>" for name in protocols)
    rows = [
        f"<tr><td>{escape(method)}</td>"
        + "".join(f"<td>{_budget(found.get((method, name)))}</td>" for name in protocols)
        + "</tr>"
        for method in dict.fromkeys(method for method, _ in found)
    ]
    tasks = ", ".join(dict.fromkeys(task for each in found.values() for task in each.tasks))
    return (
        f"<h2>The smallest budget that loses at most {100 * findings.max_loss:g} points</h2>"
        f'<p class="soft">Mean over {escape(tasks)}, against the full cache on the same documents; '
        "in brackets the 95 % interval of the loss.</p>"
        f'<div class="scroll"><table class="budgets"><tr><th>method</th>{head}</tr>'
        f"{''.join(rows)}</table></div>"
    )


def _budget(found: Recommendation | None) -> str:
    if found is None:
        return "not measured"
    if found.ratio is None or found.loss is None:
        return '<span class="soft">none that was measured</span>'
    loss = found.loss
    return (
        f"<b>{found.kept:.0%} kept</b> (kv_ratio {found.ratio:g}): {100 * loss.mean:.1f} points "
        f'<span class="soft">[{100 * loss.low:.1f} to {100 * loss.high:.1f}]</span>'
    )


def _legend(styles: dict[str, int]) -> str:
    marks = [
        f"<span>{svg((14, 14), name, [marker(style, 7, 7)])}{escape(name)}</span>"
        for name, style in styles.items()
    ]
    dashes = svg((26, 14), FULL, ['<line class="full" x1="0" x2="26" y1="7" y2="7"/>'])
    return (
        f'<div class="legend">{"".join(marks)}<span>{dashes}full</span>'
        '<span class="soft">dotted: not measured</span></div>'
    )


def _panels(findings: Findings, styles: dict[str, int]) -> str:
    pooled = figures(findings.rows, by_length=False)
    full = {figure.task: figure for figure in pooled if figure.method == FULL}
    # Each length was either compared or not; full is drawn over those that were.
    kinds = dict.fromkeys((f.task, f.question) for f in pooled if f.method != FULL)
    panels = []
    for task, question in kinds:
        mine = [f for f in pooled if (f.task, f.question) == (task, question)]
        lines = [
            Line(name, [_point(f) for f in mine if f.method == name], style)
            for name, style in styles.items()
            if any(f.method == name for f in mine)
        ]
        reference = 0.0 if task == KL else None
        if task in full:
            reference = full[task].score.mean
        label = f"{task}, {protocol_text(task, question)}"
        chart = curves(
            lines,
            label=label,
            y_label={NLL: "NLL, nats per token", KL: "KL from full, nats"}.get(task, "score"),
            reference=reference,
            percent=task not in NATS,
        )
        panels.append(
            f'<div class="panel"><h3>{escape(panel_title(mine))}</h3>'
            f'<p class="soft">{escape(label)}</p>{chart}</div>'
        )
    return f'<div class="panels">{"".join(panels)}</div>'


def _point(figure: Figure) -> Point:
    score = figure.score
    unit = "nats" if figure.task in NATS else "of 1"
    hint = (
        f"{figure.method}, {figure.kept:.1%} kept: {score.mean:.3f} {unit}, 95 % interval "
        f"{score.low:.3f} to {score.high:.3f}, {score.n} documents"
    )
    return Point(figure.kept, score.mean, score.low, score.high, hint)


def _heat_maps(findings: Findings) -> str:
    """Draws scores by depth and length, for the tasks whose answer stands in one place."""
    rows = [row for row in findings.rows if row.depth is not None]
    if not rows:
        return ""
    lengths = sorted({row.length for row in rows if row.length is not None})
    tasks = ", ".join(dict.fromkeys(row.task for row in rows))
    parts = [
        "<h2>Where in the document is the answer lost?</h2><p>Score by the depth of the needle and "
        f"the length of the prompt, over {escape(tasks)}. Dark is found, light is lost.</p>",
        f'<div class="maps">{_map("full", [r for r in rows if r.method == FULL], lengths)}</div>',
    ]
    for protocol in PROTOCOLS:
        for method in findings.sweep_plan.methods:
            mine = [r for r in rows if (r.method, r.question) == (method, protocol)]
            maps = [
                _map(f"{1 - ratio:.0%} kept", [r for r in mine if r.ratio == ratio], lengths)
                for ratio in sorted({row.ratio or 0.0 for row in mine})
            ]
            if maps:
                parts.append(
                    f"<h3>{escape(method)}, {PROTOCOL_TEXTS[protocol]}</h3>"
                    f'<div class="maps">{"".join(maps)}</div>'
                )
    return "".join(parts)


def _map(title: str, rows: Sequence[Row], lengths: Sequence[int]) -> str:
    grid = depth_grid(rows, lengths, _DEPTH_BINS)
    names = [
        f"{100 * i // _DEPTH_BINS}-{100 * (i + 1) // _DEPTH_BINS} %" for i in range(_DEPTH_BINS)
    ]
    chart = heat_map(grid, [f"{length:,}" for length in lengths], names, f"depths, {title}")
    return f'<div><p class="soft">{escape(title)}</p>{chart}</div>'


def _table(findings: Findings) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in TABLE_HEAD)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in table_cells(figure)) + "</tr>"
        for figure in findings.figures
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{rows}</table></div>'


def _data(findings: Findings) -> str:
    # "</script>" in a text would end the element.
    data = json.dumps(json.loads(as_json(findings))).replace("</", "<\\/")
    return f'<script type="application/json" id="figures">{data}</script>'
