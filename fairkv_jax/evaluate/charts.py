"""Charts in SVG: curves with intervals, and heat maps. Colours can be told apart by everybody."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from fairkv_jax.viz.palette import PALETTE

_SHAPES = ("circle", "square", "triangle", "diamond")
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 16, 12, 40
WIDTH, HEIGHT = 380, 240


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    low: float
    high: float
    hint: str


@dataclass(frozen=True)
class Line:
    name: str
    points: Sequence[Point]
    style: int
    """Index of its colour and marker."""


def curves(
    lines: Sequence[Line],
    *,
    label: str,
    y_label: str,
    reference: float | None,
    percent: bool,
) -> str:
    """Draws lines over the kept fraction, with their intervals, and full as a dashed line."""
    values = [value for line in lines for p in line.points for value in (p.y, p.low, p.high)]
    values += [] if reference is None else [reference]
    finite = [value for value in values if abs(value) < float("inf")]
    low, high = (0.0, 1.0) if percent else _range(finite)
    inner_w, inner_h = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM

    def x_of(x: float) -> float:
        return _LEFT + inner_w * x

    def y_of(y: float) -> float:
        return _TOP + inner_h * (1 - (min(max(y, low), high) - low) / (high - low))

    parts = []
    for step in range(5):
        y = low + (high - low) * step / 4
        text = f"{y:.0%}" if percent else f"{y:.2f}"
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y_of(y):.1f}" '
            f'y2="{y_of(y):.1f}"/><text x="{_LEFT - 6}" y="{y_of(y) + 4:.1f}" '
            f'text-anchor="end">{text}</text>'
        )
        parts.append(
            f'<text x="{x_of(step / 4):.1f}" y="{HEIGHT - _BOTTOM + 16}" '
            f'text-anchor="middle">{step / 4:.0%}</text>'
        )
    parts.append(
        f'<text x="{_LEFT + inner_w / 2}" y="{HEIGHT - 6}" text-anchor="middle">'
        "kept fraction of the KV cache</text>"
        f'<text transform="translate(11 {_TOP + inner_h / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    if reference is not None:
        y = y_of(reference)
        above = y - 5 if y > _TOP + 16 else y + 13
        parts.append(
            f'<line class="full" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="name" x="{_LEFT + 4}" y="{above:.1f}">full'
            "</text>"
        )
    for line in lines:
        if reference is not None and line.points:  # with everything kept, a method is full
            last = max(line.points, key=lambda point: point.x)
            parts.append(
                f'<line class="towards" x1="{x_of(last.x):.1f}" y1="{y_of(last.y):.1f}" '
                f'x2="{x_of(1):.1f}" y2="{y_of(reference):.1f}" '
                f'stroke="{PALETTE[line.style % len(PALETTE)]}"/>'
            )
        parts.append(_line(line, x_of, y_of))
    return svg((WIDTH, HEIGHT), label, parts)


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Returns limits around the values, which include 0 if that is near."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    low = 0.0 if 0 <= low < 0.5 * high else low
    room = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    return (low - room if low else 0.0), high + room


def _line(line: Line, x_of: Callable[[float], float], y_of: Callable[[float], float]) -> str:
    colour = PALETTE[line.style % len(PALETTE)]
    points = sorted(line.points, key=lambda point: point.x)
    path = " ".join(f"{x_of(p.x):.1f},{y_of(p.y):.1f}" for p in points)
    parts = [f'<polyline fill="none" stroke="{colour}" stroke-width="2.2" points="{path}"/>']
    for point in points:
        x, y = x_of(point.x) + 3 * (line.style % 2), y_of(point.y)
        if abs(point.low) < float("inf"):
            parts.append(
                f'<line stroke="{colour}" stroke-width="1.2" opacity="0.55" x1="{x:.1f}" '
                f'x2="{x:.1f}" y1="{y_of(point.low):.1f}" y2="{y_of(point.high):.1f}"/>'
            )
        parts.append(f"<g><title>{escape(point.hint)}</title>{marker(line.style, x, y)}</g>")
    return f'<g data-method="{escape(line.name)}">{"".join(parts)}</g>'


def marker(style: int, x: float, y: float) -> str:
    """Draws the marker of a line, whose shape differs as its colour does."""
    shape, fill = _SHAPES[style % len(_SHAPES)], f'fill="{PALETTE[style % len(PALETTE)]}"'
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" {fill}/>'
    if shape == "square":
        return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" {fill}/>'
    corners = (
        [(0, -5.5), (5, 4), (-5, 4)] if shape == "triangle" else [(0, -6), (6, 0), (0, 6), (-6, 0)]
    )
    path = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon points="{path}" {fill}/>'


def heat_map(
    grid: Sequence[Sequence[float | None]], columns: Sequence[str], rows: Sequence[str], label: str
) -> str:
    """Draws scores in [0, 1], dark where they are high; cells without a score are empty."""
    cell_w, cell_h, left, top = 46, 22, 58, 18
    parts = [
        f'<text x="{left + (i + 0.5) * cell_w}" y="12" text-anchor="middle">{escape(text)}</text>'
        for i, text in enumerate(columns)
    ]
    for number, (name, scores) in enumerate(zip(rows, grid, strict=True)):
        y = top + number * cell_h
        parts.append(f'<text x="{left - 6}" y="{y + 15}" text-anchor="end">{escape(name)}</text>')
        for i, score in enumerate(scores):
            box = (
                f'x="{left + i * cell_w}" y="{y}" width="{cell_w - 2}" height="{cell_h - 2}" rx="2"'
            )
            parts.append(f'<rect class="cell" {box}/>')
            if score is None:
                continue
            ink = "light" if score > 0.5 else "dark"
            parts.append(
                f'<rect class="heat" {box} opacity="{score:.3f}"/><text class="{ink}" '
                f'x="{left + (i + 0.5) * cell_w - 1}" y="{y + 14.5}" text-anchor="middle">'
                f"{100 * score:.0f}</text>"
            )
    size = (left + len(columns) * cell_w + 2, top + len(rows) * cell_h + 2)
    return svg(size, label, parts)


def svg(size: tuple[float, float], label: str, parts: Sequence[str]) -> str:
    """Returns an SVG element of that size in pixels, with a label for screen readers."""
    width, height = size
    return (
        f'<svg role="img" aria-label="{escape(label)}" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}">' + "".join(parts) + "</svg>"
    )
