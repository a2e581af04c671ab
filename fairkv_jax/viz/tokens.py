"""Pictures of which tokens of a prompt are kept."""

from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise

import numpy as np
from matplotlib.figure import Figure

from fairkv_jax.viz.palette import INK, PALETTE, SEQUENTIAL, SOFT
from fairkv_jax.viz.style import new_figure, styled


def kept_fraction(positions: Sequence[Sequence[np.ndarray]], num_tokens: int) -> np.ndarray:
    """Returns the fraction of all heads that keep each token, [T].

    Args:
        positions: by layer and KV head, the prompt positions that the head kept.
    """
    heads = [np.asarray(head) for layer in positions for head in layer]
    counts = np.zeros(num_tokens)
    for head in heads:
        counts[head] += 1
    return counts / len(heads)


def kept_text(tokens: Sequence[str], fraction: np.ndarray, caption: str) -> str:
    """Returns HTML of a text whose tokens are the darker, the more heads keep them.

    Args:
        tokens: the text in pieces; they are joined without spaces.
        fraction: [T] of the heads, in [0, 1].
    """
    spans = []
    for token, share in zip(tokens, fraction, strict=True):
        # The blue of the palette, from transparent to full; white ink where it is dark.
        ink = "#fff" if share > 0.55 else INK
        spans.append(
            f'<span title="{share:.0%} of the heads" style="background:rgba(0,114,178,{share:.2f});'
            f'color:{ink}">{escape(token)}</span>'
        )
    return (
        f'<figure style="margin:0 0 1rem"><figcaption style="color:{SOFT};font-weight:600">'
        f'{escape(caption)}</figcaption><div style="font:13px/1.7 ui-monospace,monospace;'
        f"background:#fff;white-space:pre-wrap;overflow-wrap:anywhere;border-left:3px solid "
        f'{PALETTE[0]};padding-left:.8rem">{"".join(spans)}</div></figure>'
    )


@styled
def kept_positions(
    fractions: Mapping[str, np.ndarray],
    marked: Mapping[str, tuple[int, int]],
    title: str,
    bins: int = 64,
) -> Figure:
    """Draws where in the prompt tokens are kept, a row per name.

    Args:
        fractions: [T] fraction of the heads that keep each token.
        marked: first and last position of passages that are outlined, by name.
        bins: stretches of the prompt that are averaged.
    """
    num_tokens = len(next(iter(fractions.values())))
    edges = np.linspace(0, num_tokens, min(bins, num_tokens) + 1).astype(int)
    rows = np.array(
        [
            [each[start:stop].mean() for start, stop in pairwise(edges)]
            for each in fractions.values()
        ]
    )
    figure, axes = new_figure(title, size=(6.6, 1.6 + 0.36 * len(rows)))
    ax = axes[0, 0]
    image = ax.imshow(
        rows,
        cmap=SEQUENTIAL,
        vmin=0,
        vmax=1,
        aspect="auto",
        extent=(0, num_tokens, len(rows) - 0.5, -0.5),
    )
    for name, (start, stop) in marked.items():
        ax.axvspan(start, stop + 1, fill=False, edgecolor=PALETTE[1], linewidth=1.5)
        ax.annotate(
            name,
            ((start + stop) / 2, -0.5),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=PALETTE[1],
        )
    ax.set(yticks=range(len(rows)), yticklabels=list(fractions), xlabel="position in the prompt")
    ax.grid(False)
    figure.colorbar(image, ax=ax, label="heads that keep it", format="{x:.0%}")
    return figure
