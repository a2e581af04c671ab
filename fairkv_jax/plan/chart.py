"""Small charts as inline SVG; colours come from the page's style sheet."""

from collections.abc import Sequence
from html import escape

import numpy as np

CELL_HEIGHT, MARGIN, HEADER = 13, 34, 18
WIDE, WIDEST_CELL, NARROWEST_CELL = 260, 64, 14


def heat_map(
    shade: np.ndarray, hints: Sequence[Sequence[str]], axis: str, marks: np.ndarray | None = None
) -> str:
    """One row a layer; `shade` [L, n] in [0, 1]; positive `marks` [L, n] are framed and written."""
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
    """A horizontal bar for each device, with the mean as a dashed line."""
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
