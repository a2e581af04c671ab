"""A few SVG shapes in the style of all drawings of the documentation."""

from collections.abc import Sequence
from html import escape

from fairkv_jax.viz.palette import INK, PAPER, SOFT

_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"


def rect(
    x: float,
    y: float,
    width: float,
    height: float,
    fill: str = "none",
    *,
    stroke: str = "none",
    opacity: float = 1.0,
    dashed: bool = False,
) -> str:
    """Returns a rectangle."""
    dash = ' stroke-dasharray="4 3"' if dashed else ""
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="2" '
        f'fill="{fill}" stroke="{stroke}" opacity="{opacity:g}"{dash}/>'
    )


def line(
    x1: float,
    y1: float,
    x2: float,
    y2: float,
    stroke: str = SOFT,
    *,
    dashed: bool = False,
    arrow: bool = False,
) -> str:
    """Returns a straight line, with an arrow head at its end if it is asked for."""
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    head = ' marker-end="url(#arrow)"' if arrow else ""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{stroke}" '
        f'stroke-width="1.5"{dash}{head}/>'
    )


def text(
    x: float,
    y: float,
    words: str,
    *,
    size: int = 13,
    fill: str = INK,
    anchor: str = "start",
    bold: bool = False,
) -> str:
    """Returns one line of text; `y` is its baseline."""
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill}" '
        f'text-anchor="{anchor}"{weight}>{escape(words)}</text>'
    )


def document(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    """Returns the SVG document; `title` is what a screen reader says."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'font-family="{_FONT}" role="img" aria-label="{escape(title)}">',
            f"<title>{escape(title)}</title>",
            '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            f'markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{SOFT}"/>'
            "</marker></defs>",
            f'<rect width="{width}" height="{height}" rx="6" fill="{PAPER}"/>',
            *parts,
            "</svg>",
            "",
        ]
    )
