"""Pictures of quantities that depend on another: panels of lines, with intervals if there are."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from fairkv_jax.viz.palette import PALETTE, SOFT
from fairkv_jax.viz.style import MARKERS, hide_unused, new_figure, styled

_BESIDE = 0.07
"""Distance of the intervals that are drawn side by side."""


@dataclass(frozen=True)
class Curve:
    """One line: values `y` at `x`, and the ends of their intervals."""

    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None


@styled
def curves(
    panels: Mapping[str, Mapping[str, Curve]],
    title: str,
    *,
    x_label: str,
    y_label: str,
    log_x: int | None = None,
    percent: bool = False,
    reference: tuple[float, str] | None = None,
    columns: int = 3,
    share_y: bool = True,
    markers: bool = True,
    x_ticks: Mapping[float, str] | None = None,
) -> Figure:
    """Draws panels of lines; a line's name has the same colour and marker in all panels.

    Intervals are shaded; with `x_ticks`, they are bars, side by side.

    Args:
        log_x: base of a logarithmic x axis; by default it is linear. Its labels count in k, 1,024.
        x_ticks: what the values of x are called, where they are a few choices.
        percent: whether y is a fraction, shown from 0 to 100 %.
        reference: a value of y to compare with, and its name.
    """
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    size = (max(5.2, 0.6 + 3.1 * columns), 1.2 + 2.5 * rows)
    figure, axes = new_figure(title, rows, columns, size=size, sharey=share_y)
    shown = hide_unused(axes, len(panels))
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    for ax, (panel, lines) in zip(shown, panels.items(), strict=True):
        for name, line in lines.items():
            index = names.index(name)
            colour = PALETTE[index % len(PALETTE)]
            marker = MARKERS[index % len(MARKERS)] if markers else None
            x = line.x if x_ticks is None else line.x + _BESIDE * (index - (len(names) - 1) / 2)
            ax.plot(x, line.y, color=colour, marker=marker, label=name)
            if line.low is None or line.high is None:
                continue
            if x_ticks is None:
                ax.fill_between(x, line.low, line.high, color=colour, alpha=0.15, linewidth=0)
            else:
                ax.vlines(x, line.low, line.high, color=colour, linewidth=1)
        if reference is not None:
            ax.axhline(reference[0], color=SOFT, linestyle="--", linewidth=1, label=reference[1])
        if log_x is not None:
            ax.set_xscale("log", base=log_x)
            ax.xaxis.set_major_formatter(FuncFormatter(_thousands))
        if percent:
            ax.set_ylim(-0.03, 1.03)
            ax.yaxis.set_major_formatter("{x:.0%}")
        if x_ticks is not None:
            ax.set_xticks(list(x_ticks), list(x_ticks.values()))
            ax.grid(False, axis="x")
        ax.set(title=panel, xlabel=x_label)
    for ax in axes[:, 0] if share_y else shown:
        ax.set_ylabel(y_label)
    legend = {}
    for ax in shown:
        handles, labels = ax.get_legend_handles_labels()
        legend |= dict(zip(labels, handles, strict=True))
    if len(legend) > 1:
        figure.legend(legend.values(), legend.keys(), loc="outside lower left", ncols=4)
    return figure


def _thousands(value: float, position: int | None = None) -> str:
    """Formats 2048 as 2k and 1048576 as 1M; k is 1,024, and M its square."""
    del position
    for unit, size in (("M", 1 << 20), ("k", 1 << 10)):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


@styled
def bars(values: Mapping[str, float], title: str, *, y_label: str, percent: bool = False) -> Figure:
    """Draws a horizontal bar per name, with its value beside it."""
    figure, axes = new_figure(title, size=(6.4, 1.2 + 0.34 * len(values)))
    ax = axes[0, 0]
    names = list(values)
    drawn = ax.barh(names, list(values.values()), color=PALETTE[0], height=0.7)
    ax.bar_label(drawn, fmt="{:.0%}" if percent else "{:,.4g}", padding=3, color=SOFT)
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    ax.set_xlabel(y_label)
    if percent:
        ax.set_xlim(0, 1.08)
        ax.xaxis.set_major_formatter("{x:.0%}")
    return figure


@styled
def timeline(
    seconds: np.ndarray, series: Mapping[str, Mapping[str, np.ndarray]], title: str
) -> Figure:
    """Draws quantities over time, one panel below another, with a common time axis."""
    figure, axes = new_figure(
        title, len(series), 1, size=(6.6, 1.0 + 1.55 * len(series)), sharex=True
    )
    for ax, (name, lines) in zip(axes[:, 0], series.items(), strict=True):
        for index, (label, values) in enumerate(lines.items()):
            ax.plot(seconds, values, color=PALETTE[index % len(PALETTE)], label=label)
        ax.set(title=name)
        ax.set_ylim(bottom=0)
        if len(lines) > 1:
            # Beside the panel's title, where no line can be.
            ax.legend(
                loc="lower right",
                bbox_to_anchor=(1, 1),
                borderaxespad=0,
                ncols=len(lines),
                fontsize=8,
            )
    axes[-1, 0].set_xlabel("seconds")
    return figure
