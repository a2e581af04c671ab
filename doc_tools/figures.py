"""Draws the figures of the documentation: `python -m doc_tools.figures [PROFILE.npz]`.

PROFILE.npz is a retention profile (https://github.com/aiha-lab/TANGRAM publishes some, under
`tools/head_group_clustering/cluster_maps`), from which docs/assets/balance.svg is drawn. Without
it, only the figures that need no measured profile are drawn.
"""

import sys
from pathlib import Path

import numpy as np

from doc_tools.drawing import document, line, rect, text
from fairkv_jax.plan import Plan, Profile, find_shape, make_plan
from fairkv_jax.profile.published import read_retention
from fairkv_jax.viz.palette import INK, LINE, PALETTE, SOFT

ASSETS = Path(__file__).parents[1] / "docs" / "assets"
MODEL, SCORER, DEVICES = "Llama-3.1-8B-Instruct", "Expected Attention", 8


def device_tokens(profile: Profile, plan: Plan) -> np.ndarray:
    """Returns the tokens of one average row per layer, head and device, [L, K, P]."""
    return plan.shares() * np.asarray(profile.tokens)[:, :, None]


def utilization(tokens: np.ndarray) -> float:
    """Mean over maximum of the devices' tokens, where every layer waits for its fullest device."""
    per_device = tokens.sum(1)  # [L, P]
    return float(per_device.mean(1).sum() / per_device.max(1).sum())


def balance_figure(profile: Profile, model: str, scorer: str, num_devices: int) -> str:
    """Draws what the devices hold of one layer, in contiguous blocks and with Fair-Copying.

    The layer is the one whose utilization is closest to that of all layers.
    """
    static = device_tokens(profile, make_plan(profile, num_devices, "static"))
    fair_plan = make_plan(profile, num_devices, "fair_copying", row_split="proportional")
    fair = device_tokens(profile, fair_plan)
    per_layer = static.sum(1).mean(1) / static.sum(1).max(1)
    layer = int(np.abs(per_layer - utilization(static)).argmin())
    top = float(static[layer].sum(0).max())
    width, height, left, base, tall = 860, 380, 56, 300, 190
    panel = 370
    title = (
        f"KV cache of {model} on {num_devices} devices: standard tensor parallelism uses "
        f"{utilization(static):.0%} of the devices' time, Fair-Copying {utilization(fair):.0%}"
    )
    parts = [
        text(left - 32, 30, title.split(": ")[0] + f", one layer ({scorer})", size=16, bold=True),
        text(left - 32, 52, "Cached tokens per device. Each colour is one KV head.", fill=SOFT),
    ]
    panels = (
        ("Standard tensor parallelism", static, "every step waits for this device"),
        ("Fair-Copying: heavy heads on several devices", fair, "all devices finish together"),
    )
    for index, (name, tokens, note) in enumerate(panels):
        x0 = left + index * (panel + 40)
        parts += _bars(tokens[layer], top, x0, base, tall, panel)
        fullest = base - tall * float(tokens[layer].sum(0).max()) / top
        colour = PALETTE[1] if index == 0 else PALETTE[2]
        parts += [
            line(x0 - 8, fullest, x0 + panel, fullest, colour, dashed=True),
            text(x0 + panel, fullest - 6, note, fill=colour, anchor="end"),
            text(x0 - 8, 84, name, size=14, bold=True),
            text(
                x0 - 8, 348, f"{utilization(tokens):.0%} utilization over all layers",
                size=14, fill=colour, bold=True,
            ),
        ]  # fmt: skip
    parts.append(
        text(
            left - 32, 371,
            "The mean of 28 long prompts (published by aiha-lab/TANGRAM), cached tokens only: "
            "single prompts vary, and weights take time too.",
            size=11, fill=SOFT,
        )
    )  # fmt: skip
    return document(width, height, title, parts)


def _bars(
    tokens: np.ndarray, top: float, x0: float, base: float, tall: float, width: float
) -> list[str]:
    """One stacked bar per device of `tokens` [K, P], of height `tall` at `top` tokens."""
    step = width / tokens.shape[1]
    parts = [line(x0 - 8, base, x0 + width, base, LINE)]
    for device in range(tokens.shape[1]):
        y = base
        for head in np.flatnonzero(tokens[:, device]):
            part = tall * float(tokens[head, device]) / top
            y -= part
            colour = PALETTE[head % len(PALETTE)]
            parts.append(rect(x0 + device * step, y, step - 8, part, colour, stroke="#ffffff"))
        middle = x0 + device * step + (step - 8) / 2
        parts.append(text(middle, base + 17, f"GPU {device}", size=11, fill=SOFT, anchor="middle"))
    return parts


def lengths_figure() -> str:
    """Draws the caches of one request in four heads, in pages of four tokens."""
    title = "Each KV head of a request has a length of its own, in pages of a shared pool"
    kept = ((0, 1, 2, 3, 9, 13, 14, 20, 21, 22, 23), (0, 22, 23), (0, 1, 17, 18, 22, 23), (0, 23))
    parts = [text(20, 28, "A prompt of 24 tokens: what each head keeps", size=15, bold=True)]
    parts.append(text(560, 28, "The pages that hold it", size=15, bold=True))
    for head, positions in enumerate(kept):
        y = 50 + head * 42
        parts.append(text(20, y + 17, f"head {head}", fill=SOFT))
        for token in range(24):
            fill = PALETTE[head] if token in positions else "#eef1f4"
            parts.append(rect(74 + token * 19, y, 17, 24, fill))
        for slot in range(-(-len(positions) // 4) * 4):
            x = 560 + slot * 17 + slot // 4 * 6
            used = slot < len(positions)
            fill = PALETTE[head] if used else "none"
            parts.append(rect(x, y, 15, 24, fill, stroke=PALETTE[head] if not used else "none"))
        x = 560 + 12 * 17 + 30
        parts.append(text(x, y + 17, f"length {len(positions)}", fill=INK))
    parts.append(
        text(
            20, 236,
            "Kept keys keep their positions. Generated tokens are appended to every head.",
            size=12, fill=SOFT,
        )
    )  # fmt: skip
    return document(860, 250, title, parts)


def slots_figure() -> str:
    """Draws a plan of four heads on two devices with three slots each, and a replicated head."""
    title = "A plan places heads in slots; each row of the batch has one owner per head"
    parts = [
        text(20, 28, "Head slots of one layer (P = 2 devices, C = 3 slots)", bold=True, size=15)
    ]
    places = ((0, 1, None), (0, 2, 3))
    for device, heads in enumerate(places):
        x0 = 20 + device * 290
        parts.append(rect(x0, 44, 270, 74, "#f5f7fa", stroke=LINE))
        parts.append(text(x0 + 10, 62, f"device {device}", fill=SOFT, size=12))
        for slot, head in enumerate(heads):
            x = x0 + 10 + slot * 85
            if head is None:
                parts += [
                    rect(x, 72, 80, 36, stroke=SOFT, dashed=True),
                    text(x + 40, 95, "empty", anchor="middle", size=12, fill=SOFT),
                ]
                continue
            parts += [
                rect(x, 72, 80, 36, PALETTE[head]),
                text(
                    x + 40, 95, f"head {head}", anchor="middle", size=12, fill="#ffffff", bold=True
                ),
            ]
    parts.append(text(20, 152, "Lengths of head 0, which both devices hold", bold=True, size=15))
    rows = (("row 0", 900, 0), ("row 1", 0, 640), ("row 2", 0, 580), ("row 3", 410, 0))
    for index, (name, first, second) in enumerate(rows):
        y = 172 + index * 26
        parts.append(text(20, y + 14, name, fill=SOFT, size=12))
        for device, length in enumerate((first, second)):
            x = 70 + device * 290
            parts.append(rect(x, y, max(length / 4.6, 2), 18, PALETTE[0] if length else LINE))
            parts.append(text(x + length / 4.6 + 8, y + 14, str(length), size=12))
    parts.append(
        text(
            20, 296,
            "A replica that does not serve a row has length 0 there: it reads nothing and adds 0 "
            "to the sum.",
            size=12, fill=SOFT,
        )
    )  # fmt: skip
    return document(600, 312, title, parts)


def prefix_figure() -> str:
    """Draws two rows that share the pages of a cached prefix."""
    title = "Rows share the full pages of a cached prefix and copy the last one"
    parts = [
        text(20, 28, "One head: a cached document and two questions about it", bold=True, size=15)
    ]
    for page in range(3):
        parts += [
            rect(150 + page * 95, 48, 88, 32, PALETTE[0]),
            text(194 + page * 95, 69, f"page {page}", anchor="middle", fill="#ffffff", size=12),
        ]
    parts += [
        rect(435, 48, 44, 32, PALETTE[0]),
        rect(435, 48, 88, 32, stroke=PALETTE[0]),
        text(20, 69, "cached prefix", size=13),
        text(540, 69, "page 3 is half full", size=12, fill=SOFT),
    ]
    for row in range(2):
        y = 122 + row * 52
        colour = PALETTE[row + 1]
        parts += [
            text(20, y + 21, f"row {row}", size=13),
            rect(150, y, 278, 32, stroke=PALETTE[0], dashed=True),
            text(289, y + 21, "pages 0 to 2, shared", anchor="middle", size=12, fill=PALETTE[0]),
            rect(435, y, 44, 32, PALETTE[0]),
            rect(479, y, 44, 32, colour),
            rect(530, y, 88, 32, colour),
            text(632, y + 21, "copy of page 3, then its own", size=12, fill=SOFT),
        ]
    parts.append(
        text(20, 240, "A page is free when nothing refers to it any more.", size=12, fill=SOFT)
    )
    return document(830, 254, title, parts)


def main(arguments: list[str]) -> None:
    figures = {
        "lengths": lengths_figure(),
        "slots": slots_figure(),
        "prefixes": prefix_figure(),
    }
    if arguments:
        profile = Profile.from_samples(
            read_retention(arguments[0]),
            model=MODEL,
            policy="ada_snapkv",
            budget=None,
            shape=find_shape(MODEL),
        )
        figures["balance"] = balance_figure(profile, MODEL, SCORER, DEVICES)
    for name, svg in figures.items():
        (ASSETS / f"{name}.svg").write_text(svg, encoding="utf-8")
        print(ASSETS / f"{name}.svg")


if __name__ == "__main__":
    main(sys.argv[1:])
