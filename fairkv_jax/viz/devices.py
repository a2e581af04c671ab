"""Pictures of what devices hold, and of what a decode step waits for."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from fairkv_jax.viz.palette import INK, LINE, PALETTE, PAPER, SEQUENTIAL, SOFT
from fairkv_jax.viz.style import CHARACTERS_PER_INCH, new_figure, styled


@styled
def waiting(loads: Mapping[str, np.ndarray], title: str | None = None) -> Figure:
    """Draws how long every device works and waits in one decode step, a panel per plan.

    A layer ends when its fullest device has finished, so the step takes the sum over layers of the
    fullest device's tokens, and every other device waits for the difference.

    Args:
        loads: [L, P] cached tokens per layer and device.
        title: by default, the panel in which devices wait the most.
    """
    waits = {name: 1 - each.mean(1).sum() / each.max(1).sum() for name, each in loads.items()}
    worst = max(waits, key=lambda name: waits[name])
    best = min(waits, key=lambda name: waits[name])
    title = title or (
        f"Devices wait {waits[worst]:.0%} of the time with {worst}"
        + (f", {waits[best]:.0%} with {best}" if len(loads) > 1 else "")
    )
    size = (max(5.0, 1.0 + 2.4 * len(loads)), 3.4)
    figure, axes = new_figure(title, 1, len(loads), size=size, sharey=True)
    for ax, (name, load) in zip(axes.flat, loads.items(), strict=True):
        devices = np.arange(load.shape[1])
        works, ends = load.sum(0), load.max(1).sum()
        ax.bar(devices, works, color=PALETTE[0], label="works")
        ax.bar(devices, ends - works, bottom=works, color=LINE, hatch="///", label="waits")
        ax.axhline(works.mean(), color=PALETTE[1], linestyle="--", label="mean")
        ax.set(title=f"{name}\nwaits {waits[name]:.0%}", xlabel="device", xticks=devices)
        ax.grid(False, axis="x")
    axes[0, 0].set_ylabel("cached tokens read in a step")
    axes[0, 0].yaxis.set_major_formatter("{x:,.0f}")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=3)
    return figure


@styled
def layer_packing(
    packings: Mapping[str, np.ndarray], kept: Sequence[float], title: str | None = None
) -> Figure:
    """Draws one layer's heads as blocks that fill its devices, a panel per plan.

    Args:
        packings: shares [K, P] of each head's rows on every device.
        kept: [K] tokens of every head.
        title: by default, by how much the last panel's fullest device is lighter than the first's.
    """
    tokens = np.asarray(kept, np.float64)
    tops = {name: (each * tokens[:, None]).sum(0).max() for name, each in packings.items()}
    first, last = next(iter(packings)), list(packings)[-1]
    title = title or (
        f"The fullest device holds {tops[first]:,.0f} tokens with {first}, "
        f"{tops[last]:,.0f} with {last}"
    )
    size = (max(5.0, 1.0 + 2.6 * len(packings)), 3.6)
    figure, axes = new_figure(title, 1, len(packings), size=size, sharey=True)
    for ax, (name, shares) in zip(axes.flat, packings.items(), strict=True):
        base = np.zeros(shares.shape[1])
        for head in range(len(shares)):
            height = shares[head] * tokens[head]
            copied = (shares[head] > 0).sum() > 1
            ax.bar(
                range(len(base)),
                height,
                bottom=base,
                color=PALETTE[head % len(PALETTE)],
                edgecolor=PAPER,
                linewidth=1.5,
                hatch="//" if copied else None,
            )
            for device in np.flatnonzero(height > 0.05 * max(tops.values())):
                share = f" {shares[head, device]:.0%}" if copied else ""
                ax.text(
                    device,
                    base[device] + height[device] / 2,
                    f"{head}{share}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color=INK,
                    bbox={"boxstyle": "round,pad=0.15", "fc": PAPER, "ec": "none", "alpha": 0.85},
                )
            base += height
        ax.axhline(base.mean(), color=INK, linestyle="--", linewidth=1)
        ax.set(title=name, xlabel="device", xticks=range(len(base)))
        ax.grid(False, axis="x")
    axes[0, 0].set_ylabel("tokens of one row")
    axes[0, 0].yaxis.set_major_formatter("{x:,.0f}")
    return figure


@styled
def slot_map(
    head_of_slot: np.ndarray, lengths: np.ndarray, title: str | None = None, layers: int = 8
) -> Figure:
    """Draws the head and the length in every slot, for the first layers of one row.

    Args:
        head_of_slot: int [L, P, C]; -1 marks empty slots.
        lengths: [L, P, C] cached tokens of the row; 0 where the slot does not own it.
        title: by default, how many slots own a part of the row.
    """
    shown = min(layers, len(lengths))
    owned, used = int((lengths > 0).sum()), int((head_of_slot >= 0).sum())
    title = title or (
        f"{owned} of {used} slots with a head own a part of this row: the others have length 0"
    )
    devices, slots = lengths.shape[1:]
    size = (1.2 + 0.75 * devices * slots, 1.5 + 0.38 * shown)
    figure, axes = new_figure(title, 1, devices, size=(max(6.0, size[0]), size[1]), sharey=True)
    for device, ax in enumerate(axes.flat):
        part = lengths[:shown, device]
        ax.imshow(part, cmap=SEQUENTIAL, vmin=0, vmax=lengths.max(), aspect="auto")
        for layer, slot in np.ndindex(part.shape):
            head = head_of_slot[layer, device, slot]
            text = "empty" if head < 0 else f"head {head}\n{part[layer, slot]}"
            dark = part[layer, slot] > 0.6 * lengths.max()
            colour = PAPER if dark else INK if part[layer, slot] else SOFT
            ax.text(slot, layer, text, ha="center", va="center", fontsize=7, color=colour)
        ax.set(title=f"device {device}", xlabel="slot", xticks=range(slots), yticks=range(shown))
        ax.grid(False)
    axes[0, 0].set_ylabel("layer")
    return figure


@styled
def page_map(owners: np.ndarray, names: Sequence[str], title: str, width: int = 48) -> Figure:
    """Draws the first pages of every device's pool, coloured by their owner.

    Args:
        owners: int [P, pages] index into `names`; -1 marks free pages.
        names: what the owners are called.
    """
    devices, pages = owners.shape
    rows = -(-pages // width)
    grid = np.full((devices, rows * width), np.nan)
    grid[:, :pages] = np.where(owners >= 0, owners % len(PALETTE), np.nan)
    size = (7.0, 1.3 + devices * (0.45 + 0.16 * rows))
    figure, axes = new_figure(title, devices, 1, size=size)
    colours = ListedColormap(PALETTE)
    for device, ax in enumerate(axes.flat):
        cells = np.ma.masked_invalid(grid[device].reshape(rows, width))
        ax.pcolormesh(
            cells, cmap=colours, vmin=-0.5, vmax=len(PALETTE) - 0.5, edgecolors=LINE, linewidth=0.4
        )
        ax.invert_yaxis()
        ax.set(title=f"device {device}", xticks=[], yticks=[])
        ax.grid(False)
    handles = [
        Patch(color=PALETTE[index % len(PALETTE)], label=name) for index, name in enumerate(names)
    ]
    longest = max(map(len, names)) + 6  # with the coloured patch
    columns = max(1, min(len(names), int(size[0] * CHARACTERS_PER_INCH) // longest))
    figure.legend(handles=handles, loc="outside lower left", ncols=columns)
    return figure
