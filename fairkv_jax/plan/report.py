"""Renders a plan as a self-contained HTML page: the imbalance, the plan and its gain."""

from collections.abc import Sequence
from html import escape

import numpy as np

from fairkv_jax.plan.plan import Plan
from fairkv_jax.plan.profile import Profile
from fairkv_jax.plan.table import plan_name
from fairkv_jax.viz.palette import INK, LINE, PALETTE, PAPER, SOFT

CELL_HEIGHT, MARGIN, HEADER = 13, 34, 18
WIDE, WIDEST_CELL, NARROWEST_CELL = 260, 64, 14
STYLE = f"""
:root {{ color-scheme: light dark; --ink: {INK}; --soft: {SOFT}; --line: {LINE};
  --paper: {PAPER}; --panel: #f5f7fa; --cell: #e9eef5;
  --heat: {PALETTE[0]}; --mark: {PALETTE[1]}; }}"""
STYLE += """
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #9aa4b2; --line: #333b47;
  --paper: #14181f; --panel: #1c222b; --heat: #6aa5ff; --mark: #ff9257; --cell: #232b36; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1120px; margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2.5rem 0 .25rem; }
p { margin: .25rem 0 .75rem; max-width: 75ch; } .soft { color: var(--soft); }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1.5rem 0; }
.figure { background: var(--panel); border-radius: 8px; padding: .75rem 1.25rem; flex: 1 1 9rem; }
.figure b { display: block; font-size: 1.35rem; line-height: 1.4; white-space: nowrap; }
.side { display: flex; flex-wrap: wrap; gap: 2.5rem; align-items: flex-start; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .55rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { font-weight: 600; color: var(--soft); } th:first-child, td:first-child { text-align: left;
  padding-left: 0; } tr.chosen { font-weight: 600; }
svg { display: block; max-width: 100%; height: auto; }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft); }
svg .cell { fill: var(--cell); } svg .heat { fill: var(--heat); } svg .mark { fill: none;
  stroke: var(--mark); stroke-width: 1.6; } svg text.light { fill: var(--paper); font-weight: 600; }
svg text.dark { fill: var(--ink); font-weight: 600; }
svg .bar { fill: var(--heat); } svg .mean { stroke: var(--mark); stroke-dasharray: 4 3; }
"""


def report_page(profile: Profile, chosen: Plan, plans: Sequence[Plan]) -> str:
    """Returns the page; the chosen plan is compared with `plans`, whose first one is `static`."""
    title = f"{profile.model or 'A model'} on {chosen.num_devices} devices"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{escape(_subtitle(profile, chosen))}</p>',
        _figures(chosen, plans[0]),
        _heads(profile, chosen),
        _devices(profile, plans[0], chosen),
        _strategies(profile, chosen, plans),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>"
        + "\n".join(body)
        + "</body></html>\n"
    )


def _subtitle(profile: Profile, plan: Plan) -> str:
    budget = "" if profile.budget is None else f", {profile.budget} tokens per head on average"
    cost = plan.cost.hardware or "a measured cost model"
    num_bytes = plan.cost.token_bytes
    cached = f", {num_bytes:g} bytes per cached token and head" if num_bytes else ""
    return (
        f"{profile.num_layers} layers with {profile.num_heads} KV heads each, "
        f"{profile.policy}{budget}; "
        f"planned with {plan_name(plan)} for {cost} at batch {plan.cost.batch}{cached}."
    )


def _figures(plan: Plan, static: Plan) -> str:
    speed = plan.tokens_per_second / static.tokens_per_second
    attention = static.step_seconds / static.cost.batch * plan.cost.batch / plan.step_seconds
    shown = (
        (f"{speed:.2f}×", f"the tokens/s of {plan_name(static)}"),
        (f"{attention:.2f}×", "the speed of attention, per row"),
        (f"{static.utilization:.0%} → {plan.utilization:.0%}", "utilization in attention"),
        (
            f"{plan.num_extra_replicas}",
            f"extra replicas in {plan.num_layers} layers, {plan.slots} slots per device",
        ),
        (f"{plan.gap:.1%}", "maximum distance from the optimal plan"),
    )
    cells = (f'<div class="figure"><b>{value}</b>{escape(text)}</div>' for value, text in shown)
    return f'<div class="figures">{"".join(cells)}</div>'


def _heads(profile: Profile, plan: Plan) -> str:
    tokens = profile.array
    replicas = plan.replicas().sum(2)
    hints = [
        [
            f"layer {layer}, head {head}: {tokens[layer, head]:.0f} tokens, "
            + ", ".join(
                f"device {replica.device} ({replica.share:.0%})"
                for replica in plan.layers[layer]
                if replica.head == head
            )
            for head in range(profile.num_heads)
        ]
        for layer in range(profile.num_layers)
    ]
    spread = tokens.max(1) / tokens.mean(1)
    return (
        f"<h2>Heads</h2><p>Cached tokens of one row per head, from {tokens.min():.0f} (light) to "
        f"{tokens.max():.0f} (dark). In the median layer, the largest head holds "
        f"{np.median(spread):.2f} times the mean. Framed heads are replicated; the number is the "
        "number of replicas.</p>"
        + heat_map(tokens / tokens.max(), hints, "head", np.where(replicas > 1, replicas, 0))
    )


def _devices(profile: Profile, before: Plan, after: Plan) -> str:
    loads = [plan.loads(profile.array) for plan in (before, after)]
    most = max(float((load / load.mean(1, keepdims=True)).max()) for load in loads)
    total = max(float(load.sum(0).max()) for load in loads)
    parts = []
    for plan, load in zip((before, after), loads, strict=True):
        relative = load / load.mean(1, keepdims=True)
        hints = [
            [
                f"layer {layer}, device {device}: {load[layer, device]:.0f} tokens, "
                f"{relative[layer, device]:.2f} times the mean; heads "
                + ", ".join(
                    str(replica.head) for replica in plan.layers[layer] if replica.device == device
                )
                for device in range(plan.num_devices)
            ]
            for layer in range(plan.num_layers)
        ]
        max_over_mean = load.max(1).sum() / load.mean(1).sum()
        parts.append(
            f"<div><p><b>{escape(plan_name(plan))}</b><br>the fullest device of a layer holds "
            f"{max_over_mean:.2f} times the mean</p>"
            + heat_map(relative / most, hints, "device")
            + '<p class="soft">Sum over layers; the dashed line is the mean.</p>'
            + bars(load.sum(0), total)
            + "</div>"
        )
    return (
        "<h2>Devices, before and after</h2><p>Each layer takes as long as its fullest device, so "
        f"even rows are fast. The darkest shade is {most:.2f} times the layer's mean.</p>"
        f'<div class="side">{"".join(parts)}</div>'
    )


def _strategies(profile: Profile, chosen: Plan, plans: Sequence[Plan]) -> str:
    heads = (
        "strategy", "attention", "whole step", "utilization", "of tokens", "batch", "tokens/s",
        "ratio", "extra replicas", "slots", "+1 replica", "fullest",
    )  # fmt: skip
    rows = []
    for plan in plans:
        cells = (
            escape(plan_name(plan)),
            f"{plan.step_seconds * 1e3:.3g} ms",
            f"{(plan.step_seconds + plan.rest_seconds) * 1e3:.3g} ms",
            f"{plan.utilization:.1%}",
            f"{plan.token_utilization(profile.array):.1%}",
            str(plan.cost.batch),
            f"{plan.tokens_per_second:,.0f}",
            f"{plan.tokens_per_second / plans[0].tokens_per_second:.2f}×",
            str(plan.num_extra_replicas),
            str(plan.slots),
            f"+{plan.one_more_replica_gain:.2%}",
            f"{plan.device_bytes / 2**30:.2f} GiB",
        )
        mark = ' class="chosen"' if plan is chosen else ""
        rows.append(f"<tr{mark}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    slot = chosen.cost.a_seconds / chosen.cost.b_seconds_per_token
    return (
        "<h2>Comparison of strategies</h2><p>Reading one head's weights takes as long as reading "
        f"{slot:,.0f} cached tokens, or {slot / chosen.cost.batch:,.0f} tokens of each row at a "
        f"batch of {chosen.cost.batch}. Every slot costs that time, even an empty one. A replica "
        "pays off if it moves more tokens than that, or if it fills a slot that would be empty. "
        "<i>Of tokens</i> is the utilization if weights cost nothing. "
        "<i>Ratio</i> compares the tokens/s with the first strategy. <i>+1 replica</i> is the gain "
        "in tokens/s of one more replica per layer. <i>Fullest</i> is the memory of the device "
        "with the most weights and cached tokens.</p>"
        f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'
    )


def heat_map(
    shade: np.ndarray, hints: Sequence[Sequence[str]], axis: str, marks: np.ndarray | None = None
) -> str:
    """Draws a row of cells per layer.

    Args:
        shade: [L, n] darkness of the cells in [0, 1].
        marks: [L, n] numbers; cells with a positive number are framed and show it.
    """
    layers, columns = shade.shape
    width = min(max(WIDE // columns, NARROWEST_CELL), WIDEST_CELL)
    every = 1 if columns <= 16 else 4
    parts = ['<text x="0" y="12">layer</text>']
    for column in range(0, columns, every):
        x = MARGIN + column * width + width / 2
        parts.append(f'<text x="{x}" y="12" text-anchor="middle">{column}</text>')
    for layer in range(layers):
        y = HEADER + layer * CELL_HEIGHT
        if layer % 5 == 0 or layer == layers - 1:
            parts.append(f'<text x="24" y="{y + 10}" text-anchor="end">{layer}</text>')
        for column in range(columns):
            x = MARGIN + column * width
            mark = 0 if marks is None else int(marks[layer, column])
            parts.append(_cell(x, y, width, shade[layer, column], hints[layer][column], mark))
    size = (MARGIN + columns * width + 2, HEADER + layers * CELL_HEIGHT + 2)
    return _svg(size, f"{axis}s by layer", parts)


def bars(values: np.ndarray, most: float) -> str:
    """Draws a horizontal bar per device, and the mean as a dashed line."""
    length, height = 220, 16
    parts = []
    for index, value in enumerate(values):
        y = index * height
        parts.append(
            f'<text x="24" y="{y + 12}" text-anchor="end">{index}</text>'
            f'<rect class="bar" x="{MARGIN}" y="{y + 2}" height="{height - 4}" rx="2" '
            f'width="{value / most * length:.1f}"/>'
            f'<text x="{MARGIN + value / most * length + 5:.1f}" y="{y + 12}">{value:,.0f}</text>'
        )
    x = MARGIN + values.mean() / most * length
    parts.append(f'<line class="mean" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{len(values) * 16}"/>')
    return _svg((MARGIN + length + 70, len(values) * height), "tokens per device", parts)


def _cell(x: float, y: float, width: float, shade: float, hint: str, mark: int) -> str:
    box = f'x="{x}" y="{y}" width="{width - 1.5}" height="{CELL_HEIGHT - 1.5}" rx="1.5"'
    cell = f'<rect class="cell" {box}/><rect class="heat" {box} opacity="{shade:.3f}"/>'
    if mark:
        cell += f'<rect class="mark" {box}/>'
        cell += (
            f'<text class="{"light" if shade > 0.5 else "dark"}" x="{x + width / 2 - 0.75}" '
            f'y="{y + 10}" text-anchor="middle">{mark}</text>'
        )
    return f"<g><title>{escape(hint)}</title>{cell}</g>"


def _svg(size: tuple[float, float], label: str, parts: Sequence[str]) -> str:
    width, height = size
    return (
        f'<svg role="img" aria-label="{escape(label)}" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}">' + "".join(parts) + "</svg>"
    )
