"""Compares planning strategies for models, devices and budgets, at equal batch and equal memory.

    python -m benchmarks.balance --imbalance 0.6 --output_dir benchmarks/results

Profiles are synthetic and times come from the cost model, so the figures are predictions and not
measurements. The command writes balance.json, balance.md (a table) and balance.svg (a figure).
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from absl import app, flags
from tqdm import tqdm

from fairkv_jax.plan import HARDWARE, SHAPES, CostModel, Plan, Profile, make_plan
from fairkv_jax.profile import synthetic_profile

_MODELS = flags.DEFINE_list(
    "models", ["llama-3-8b", "mistral-small-24b", "llama-3.3-70b"], "Names of model shapes."
)
_DEVICES = flags.DEFINE_list("devices", ["2", "4", "8"], "Numbers of devices.")
_BUDGETS = flags.DEFINE_list(
    "budgets", ["128", "256", "512", "1024", "2048"], "Tokens kept per head on average."
)
_BATCH = flags.DEFINE_integer("batch", 64, "Rows of the batch in the comparison at equal batch.")
_HARDWARE = flags.DEFINE_enum("hardware", "H100", list(HARDWARE), "Hardware of the cost model.")
_IMBALANCE = flags.DEFINE_float(
    "imbalance", 0.6, "Imbalance (std / mean of tokens per head) of the synthetic profiles."
)
_SEED = flags.DEFINE_integer("seed", 0, "Random seed of the synthetic profiles.")
_OUTPUT = flags.DEFINE_string("output_dir", "benchmarks/results", "Folder for the results.")

COMPARED = {
    "static": ("static", "equal"),
    "best effort": ("best_effort", "equal"),
    "fair, equal": ("fair_copying", "equal"),
    "fair, proportional": ("fair_copying", "proportional"),
}
MEMORY_FOR_USE = 0.9
"""Fraction of a device's memory for weights and KV cache."""


@dataclass(frozen=True)
class Row:
    """The figures of one strategy in one setting; ratios are relative to `static`."""

    model: str
    devices: int
    budget: int
    strategy: str
    utilization: float
    step_ratio: float
    """Step time relative to static's, at equal batch; below 1 is faster."""
    attention_ratio: float
    """Like `step_ratio`, for attention alone."""
    extra_replicas: int
    slots: int
    memory_batch: int
    """Largest batch that fits into the memory."""
    memory_tokens_per_second: float
    memory_batch_ratio: float
    memory_speed_ratio: float
    memory_extra_replicas: int
    memory_slots: int


def compare(profile: Profile, devices: int) -> list[Row]:
    """Compares the strategies on one profile; returns no rows if the weights do not fit."""
    assert profile.shape is not None
    cost = CostModel.of(profile.shape, devices, _HARDWARE.value, batch=_BATCH.value)
    memory = HARDWARE[_HARDWARE.value].memory_bytes * MEMORY_FOR_USE

    def plans(**options) -> dict[str, Plan]:
        return {
            name: make_plan(profile, devices, kind, row_split=split, cost=cost, effort=0, **options)
            for name, (kind, split) in COMPARED.items()
        }

    try:
        filled = plans(objective="throughput", device_bytes=memory)
    except ValueError:
        return []
    equal = plans()
    base, full = equal["static"], filled["static"]
    return [
        Row(
            model=profile.model,
            devices=devices,
            budget=profile.budget or 0,
            strategy=name,
            utilization=equal[name].utilization,
            step_ratio=base.tokens_per_second / equal[name].tokens_per_second,
            attention_ratio=equal[name].step_seconds / base.step_seconds,
            extra_replicas=equal[name].num_extra_replicas,
            slots=equal[name].slots,
            memory_batch=filled[name].cost.batch,
            memory_tokens_per_second=filled[name].tokens_per_second,
            memory_batch_ratio=filled[name].cost.batch / full.cost.batch,
            memory_speed_ratio=filled[name].tokens_per_second / full.tokens_per_second,
            memory_extra_replicas=filled[name].num_extra_replicas,
            memory_slots=filled[name].slots,
        )
        for name in COMPARED
    ]


def markdown(rows: list[Row]) -> str:
    """Formats the results as a Markdown table below a summary."""
    lines = [
        "# Balance of per-head budgets over devices",
        "",
        f"Synthetic Ada-SnapKV profiles, imbalance (std / mean within a layer) {_IMBALANCE.value}, "
        f"seed {_SEED.value}; {_HARDWARE.value}, bfloat16, times of the cost model. Left: a batch "
        f"of {_BATCH.value}. Right: the batch that fits into {MEMORY_FOR_USE:.0%} of the memory.",
        "",
        *findings(rows),
        "",
        "| model | devices | budget | strategy | utilization | step | attention | replicas | slots "
        "| batch in memory | tokens/s | batch ratio | tokens/s ratio | replicas | slots |",
        "|---|--:|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {row.model} | {row.devices} | {row.budget} | {row.strategy} | {row.utilization:.1%} "
        f"| {row.step_ratio:.3f} | {row.attention_ratio:.3f} | {row.extra_replicas} | {row.slots} "
        f"| {row.memory_batch} | {row.memory_tokens_per_second:,.0f} "
        f"| {row.memory_batch_ratio:.3f} | {row.memory_speed_ratio:.3f} "
        f"| {row.memory_extra_replicas} | {row.memory_slots} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def findings(rows: list[Row]) -> list[str]:
    """Summarises where replication improves on best effort, and where it does not."""

    def gains(ratio: Callable[[Row], float]) -> list[tuple[float, Row]]:
        alone = {
            (row.model, row.devices, row.budget): ratio(row)
            for row in rows
            if row.strategy == "best effort"
        }
        return [
            (ratio(row) / alone[row.model, row.devices, row.budget] - 1, row)
            for row in rows
            if row.strategy == "fair, equal"
        ]

    lines = []
    for title, ratio in (
        (f"At a batch of {_BATCH.value}", lambda row: 1 / row.step_ratio),
        ("At equal memory", lambda row: row.memory_speed_ratio),
    ):
        found = gains(ratio)
        pays = [gain for gain, _ in found if gain >= 0.01]
        best, where = max(found, key=lambda pair: pair[0])
        lines.append(
            f"- {title}, replicas (equal split) add at least 1 % to best effort's tokens/s in "
            f"{len(pays)} of {len(found)} settings. The largest gain is {best:+.1%} for "
            f"{where.model} on {where.devices} devices at a budget of {where.budget}."
        )
        idle = [row for gain, row in found if gain < 0.01]
        if idle:
            names = sorted({(r.model, r.devices) for r in idle})
            settings = "; ".join(
                f"{model} on {devices}: "
                + ", ".join(str(r.budget) for r in idle if (r.model, r.devices) == (model, devices))
                for model, devices in names
            )
            lines.append(f"  The gain is below 1 % at these budgets: {settings}.")
    return lines


def figure(rows: list[Row]) -> str:
    """Draws tokens/s relative to static at equal memory, a panel per model and device count."""
    models, devices = (list(dict.fromkeys(map(key, rows))) for key in (_model, _devices))
    width, height, colours = 300, 190, ("#9aa4b2", "#6aa5ff", "#1f5fbf", "#d9480f")
    top = max(row.memory_speed_ratio for row in rows) * 1.05
    parts = []
    for line, model in enumerate(models):
        for column, count in enumerate(devices):
            x0, y0 = 45 + column * width, 40 + line * height
            panel = [row for row in rows if (row.model, row.devices) == (model, count)]
            parts.append(f'<text x="{x0}" y="{y0 - 6}" class="t">{model}, {count} devices</text>')
            for tick in (0.0, 0.5, 1.0, 1.5, 2.0, 2.5):
                if tick <= top:
                    y = y0 + 130 * (1 - tick / top)
                    parts.append(
                        f'<line x1="{x0}" x2="{x0 + 250}" y1="{y:.1f}" y2="{y:.1f}"/>'
                        f'<text x="{x0 - 6}" y="{y + 4:.1f}" text-anchor="end">{tick}</text>'
                    )
            for group, budget in enumerate(dict.fromkeys(row.budget for row in panel)):
                bars = [row for row in panel if row.budget == budget]
                for bar, (row, colour) in enumerate(zip(bars, colours, strict=True)):
                    tall = 130 * row.memory_speed_ratio / top
                    parts.append(
                        f'<rect x="{x0 + 5 + group * 50 + bar * 10}" y="{y0 + 130 - tall:.1f}" '
                        f'width="9" height="{tall:.1f}" fill="{colour}"><title>{row.strategy}, '
                        f"{row.memory_speed_ratio:.2f}x, batch {row.memory_batch}</title></rect>"
                    )
                parts.append(
                    f'<text x="{x0 + 25 + group * 50}" y="{y0 + 145}" text-anchor="middle">'
                    f"{budget}</text>"
                )
    for index, (name, colour) in enumerate(zip(COMPARED, colours, strict=True)):
        x, y = 45 + index * 150, 40 + len(models) * height
        parts.append(
            f'<rect x="{x}" y="{y - 10}" width="11" height="11" fill="{colour}"/>'
            f'<text x="{x + 16}" y="{y}">{name}</text>'
        )
    size = (60 + len(devices) * width, 60 + len(models) * height)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{size[0]}" height="{size[1]}" '
        f'viewBox="0 0 {size[0]} {size[1]}"><style>text {{ font: 11px sans-serif; fill: #444 }} '
        ".t { font-weight: 600; fill: #111 } line { stroke: #dde2e9 }</style>"
        '<rect width="100%" height="100%" fill="#fff"/><text x="45" y="16" class="t">'
        "Tokens/s relative to static at equal memory, by kept tokens per head</text>"
        + "".join(parts)
        + "</svg>\n"
    )


def _model(row: Row) -> str:
    return row.model


def _devices(row: Row) -> int:
    return row.devices


def main(arguments: list[str]) -> None:
    del arguments
    settings = [
        (model, int(devices), int(budget))
        for model in _MODELS.value
        for devices in _DEVICES.value
        for budget in _BUDGETS.value
    ]
    rows = []
    for model, devices, budget in tqdm(settings, desc="settings"):
        profile = synthetic_profile(
            SHAPES[model], budget, model=model, imbalance=_IMBALANCE.value, seed=_SEED.value
        )
        rows += compare(profile, devices)
    if not rows:
        raise SystemExit(
            f"no model fits into the memory of the {_HARDWARE.value} devices: raise --devices"
        )
    folder = Path(_OUTPUT.value)
    folder.mkdir(parents=True, exist_ok=True)
    table = markdown(rows)
    (folder / "balance.md").write_text(table, encoding="utf-8")
    (folder / "balance.svg").write_text(figure(rows), encoding="utf-8")
    record = {
        "flags": {flag.name: flag.value for flag in (_HARDWARE, _BATCH, _IMBALANCE, _SEED)},
        "rows": [asdict(row) for row in rows],
    }
    (folder / "balance.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(table)


if __name__ == "__main__":
    app.run(main)
