"""Pictures of what heads keep: heat maps, and the Lorenz curve."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from fairkv_jax.viz.palette import SEQUENTIAL, SOFT
from fairkv_jax.viz.style import MARKERS, new_figure, styled


@styled
def head_maps(
    kept: Mapping[str, np.ndarray],
    title: str | None = None,
    *,
    label: str = "tokens kept / mean",
) -> Figure:
    """Draws a quantity of every head relative to the mean of all heads, a map per name.

    Args:
        kept: [L, K] tokens, or another quantity that `label` names; the maps share one scale.
        title: by default, by how much the largest head of a layer keeps more than its mean.
        label: what the colours stand for.
    """
    relative = {name: np.asarray(each) / np.mean(each) for name, each in kept.items()}
    top = max(each.max() for each in relative.values())
    title = title or _most_uneven(relative)
    layers = max(len(each) for each in relative.values())
    size = (max(5.0, 1.2 + 1.9 * len(kept)), 2.0 + 0.1 * layers)
    figure, axes = new_figure(title, 1, len(kept), size=size)
    image = None
    for ax, (name, each) in zip(axes.flat, relative.items(), strict=True):
        image = ax.imshow(each, cmap=SEQUENTIAL, vmin=0, vmax=top, aspect="auto")
        ax.set(title=name, xlabel="KV head", xticks=range(each.shape[1]))
        ax.grid(False)
    axes[0, 0].set_ylabel("layer")
    if image is not None:
        figure.colorbar(image, ax=axes, label=label, shrink=0.8)
    return figure


def _most_uneven(maps: Mapping[str, np.ndarray]) -> str:
    """States how far the largest heads of the most uneven map are from their layers' means."""
    spread = {name: np.median(each.max(1) / each.mean(1)) for name, each in maps.items()}
    widest = max(spread, key=lambda name: spread[name])
    return (
        f"{widest}: in the median layer, the largest head keeps {spread[widest]:.1f} times the mean"
    )


@styled
def lorenz(kept: Mapping[str, np.ndarray], title: str | None = None) -> Figure:
    """Draws which share of all kept tokens the heads hold that keep the least.

    Args:
        kept: tokens per head, of any shape.
        title: by default, what the lighter half of the heads holds.
    """
    curves = {name: lorenz_curve(each) for name, each in kept.items()}
    half = {name: float(np.interp(0.5, *curve)) for name, curve in curves.items()}
    least = min(half, key=lambda name: half[name])
    title = title or f"{least}: half of the heads hold {half[least]:.0%} of the tokens"
    figure, axes = new_figure(title, size=(5.2, 4.4))
    ax = axes[0, 0]
    ax.plot([0, 1], [0, 1], color=SOFT, linestyle="--", linewidth=1, label="all heads equal")
    for index, (name, (heads, tokens)) in enumerate(curves.items()):
        label = f"{name} (Gini {gini(kept[name]):.2f})"
        every = max(1, len(heads) // 8)
        ax.plot(heads, tokens, marker=MARKERS[index % 8], markevery=every, label=label)
    ax.set(xlabel="share of the heads, lightest first", ylabel="share of the kept tokens")
    ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    ax.xaxis.set_major_formatter("{x:.0%}")
    ax.yaxis.set_major_formatter("{x:.0%}")
    ax.legend(loc="upper left")
    return figure


def lorenz_curve(kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns shares of the heads, and of the tokens that the lightest heads hold, from 0 to 1."""
    ordered = np.sort(np.asarray(kept, np.float64).reshape(-1))
    tokens = np.concatenate([[0.0], ordered.cumsum()]) / ordered.sum()
    return np.linspace(0, 1, len(tokens)), tokens


def gini(kept: np.ndarray) -> float:
    """Returns the Gini coefficient: 0 if all heads keep the same, towards 1 if one keeps all."""
    heads, tokens = lorenz_curve(kept)
    return float(1 - 2 * np.trapezoid(tokens, heads))
