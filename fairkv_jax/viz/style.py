"""The style of all pictures, and the figure that they begin with."""

import functools
import textwrap
from collections.abc import Callable
from io import StringIO
from typing import Any, ParamSpec, TypeVar

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fairkv_jax.viz.palette import INK, LINE, PALETTE, PAPER, SOFT

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
"""Markers of the lines, so that colour is not the only difference."""
CHARACTERS_PER_INCH = 9.0
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
P = ParamSpec("P")
R = TypeVar("R")
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": LINE,
    "axes.facecolor": PAPER,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=PALETTE),
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titlecolor": SOFT,
    "figure.facecolor": PAPER,
    "figure.dpi": 100,
    "savefig.dpi": 100,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "hatch.color": SOFT,
    "hatch.linewidth": 0.5,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "lines.markersize": 5,
    "svg.fonttype": "none",
    "svg.hashsalt": "fairkv_jax",
    "xtick.color": SOFT,
    "ytick.color": SOFT,
}


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Decorates a function that draws, so that it draws in this package's style."""

    @functools.wraps(draw)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return wrapped


def new_figure(
    title: str, rows: int = 1, columns: int = 1, *, size: tuple[float, float], **options: Any
) -> tuple[Figure, np.ndarray]:
    """Returns a figure with the title at its top left, and its axes [rows, columns].

    `size` is in inches; `options` are those of `Figure.subplots`.
    """
    figure = Figure(figsize=size, layout="constrained")
    lines = textwrap.wrap(title, max(20, int(size[0] * CHARACTERS_PER_INCH)))
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=12, fontweight="bold")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, axes


def hide_unused(axes: np.ndarray, used: int) -> list[Axes]:
    """Returns the first `used` axes, and removes the others from their figure."""
    flat = list(axes.flat)
    for unused in flat[used:]:
        unused.remove()
    return flat[:used]


def save_svg(figure: Figure) -> str:
    """Returns the figure as an SVG element, the same for the same figure."""
    out = StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(out, format="svg", metadata=_NO_METADATA)
    text = out.getvalue()
    return text[text.index("<svg") :]
