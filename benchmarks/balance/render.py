"""Renders balance.json: tables in Markdown, an overview in SVG, and a page to look figures up."""

import json
import re
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.balance.compare import HELD_OUT_BATCH, HELD_OUT_KEPT
from benchmarks.balance.published import HEAD_SCORES, HEADKV_BUDGET, NAMES, RATIO, SCORERS
from fairkv_jax.plan import HARDWARE
from fairkv_jax.viz.curves import Curve, curves
from fairkv_jax.viz.style import save_svg

TEMPLATE = Path(__file__).with_name("page.html")
FAIR = "fair copying"
PAYS = 1.05
"""Speed-up over static from which the page recommends a plan."""
ROOFLINE_BATCH = 300
"""Rows above which matrix products of an H100 are limited by arithmetic: 989e12 / 3.35e12."""
SHOWN_BATCH, SHOWN_KEPT = 64, 2048
MEMORY_KEPT = (2048, 16384)
"""Budgets of the table at equal memory."""
Record = dict[str, Any]


def step_ratio(record: Record, strategy: str = FAIR) -> np.ndarray:
    """Returns a strategy's tokens/s relative to static, [batches, kept]."""
    return np.array(record["equal_batch"][strategy]["step_ratio"])


def overview(data: Record) -> str:
    """Draws the speed-up of fair copying against batch x kept, on the most devices."""
    panels: dict[str, dict[str, Curve]] = {}
    tokens = np.outer(data["batches"], data["kept"])
    for record in _on_most_devices(data):
        x, y = _largest_by_product(step_ratio(record), tokens)
        panel = f"{record['model']}, {record['devices']} devices"
        panels.setdefault(panel, {})[NAMES[record["scorer"]]] = Curve(x, y)
    figure = curves(
        panels,
        _headline(data),
        x_label="batch x tokens kept per head",
        y_label="tokens/s relative to static",
        log_x=2,
        reference=(1.0, "static"),
    )
    return save_svg(figure)


def _headline(data: Record) -> str:
    """States from where on copying heads pays on the most devices, in measured profiles."""
    tokens = np.outer(data["batches"], data["kept"])
    from_where = []
    for record in _on_most_devices(data):
        if record["scorer"] not in SCORERS:
            continue
        pays = step_ratio(record) >= PAYS
        from_where.append(tokens[pays].min() if pays.any() else np.inf)
    middle = np.median(from_where)
    return (
        f"Copying heads pays {PAYS - 1:.0%} or more from {middle:,.0f} cached tokens per head on "
        "(batch x kept) in the median measured profile"
    )


def _on_most_devices(data: Record) -> list[Record]:
    most: dict[tuple[str, str], Record] = {}
    for record in data["records"]:
        key = (record["model"], record["scorer"])
        if key not in most or record["devices"] > most[key]["devices"]:
            most[key] = record
    return list(most.values())


def tables(data: Record) -> str:
    """Formats the results as Markdown; balance.json holds every cell."""
    row = data["batches"].index(SHOWN_BATCH), data["kept"].index(SHOWN_KEPT)
    return "\n".join(
        [
            "# Balance of per-head budgets over devices",
            "",
            f"Published profiles (28 prompts of 14,000 to 26,000 tokens; {data['source']}, "
            f"{data['licence']}), scaled to a number of kept tokens; {data['hardware']}, times of "
            "the cost model, which counts the bytes that a decode step reads. The profiles are "
            "measured, the times are predicted. Made by `python -m benchmarks.balance --profiles "
            "DIR --scores DIR`; every cell is in [balance.json](balance.json), "
            "[balance.html](balance.html) looks it up.",
            "",
            *_about_scores(data),
            "![Speed-up over static](balance.svg)",
            "",
            *_findings(data),
            "",
            "## Equal batch",
            "",
            f"{SHOWN_BATCH} rows, {SHOWN_KEPT:,} tokens kept per head. *Tokens* and *time*: "
            "utilization of cached tokens alone, and of time with the weights of every slot; "
            "`static`, then `fair_copying`. Ratios are tokens/s relative to `static`; "
            "*copies* is the number of additional replicas over all layers.",
            "",
            "| model | scorer | devices | tokens | time | attention | whole step "
            "| best effort, whole step | copies | slots |",
            "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
            *(_equal_batch_row(record, *row) for record in data["records"]),
            "",
            "## From which batch and budget on",
            "",
            "Whole step of `fair_copying` relative to `static` on the most devices. "
            "Columns are batch x kept tokens per head: 64 x 2,048 is 131,072. For models with "
            "sliding windows and for DuoAttention, the largest ratio of the cells with that "
            "product.",
            "",
            *_by_product(data),
            "",
            "## Equal memory",
            "",
            f"Every strategy with the batch that {data['memory_for_use']:.0%} of the devices' "
            "memory holds beside the weights. Where every layer scales with the budget, the ratios "
            "do not depend on it, since half the budget is twice the batch; these have one line, "
            f"at the largest budget. Above {ROOFLINE_BATCH} rows, arithmetic limits the MLPs, "
            "which the cost model leaves out, and the ratios are too large.",
            "",
            "| model | scorer | devices | kept | batch, static | batch, fair | tokens/s, best "
            "effort | tokens/s, fair | attention per row, fair | copies | slots |",
            "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
            *(line for record in data["records"] for line in _memory_rows(record)),
            "",
            "## Prompts that the plan has not seen",
            "",
            "Plans from every second prompt; requests drawn from the others, "
            f"{HELD_OUT_BATCH} rows, {HELD_OUT_KEPT:,} tokens kept. *Routed*: the replica of a "
            "copied head is chosen by the request's real lengths, as the engine does; *fixed*: by "
            "the number of the row. *Planned* is what the plan expects of its own prompts. "
            "Only steps with a full batch count. Head scores are not listed: their budgets are the "
            "same for every prompt.",
            "",
            "| model | scorer | devices | utilization, static | best effort | fair, fixed "
            "| fair, routed | attention, routed | whole step, routed | planned |",
            "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
            *(_held_out_row(record, *row) for record in data["records"] if record["held_out"]),
            "",
            "## What the figures leave out",
            "",
            "- The profiles keep 30 % of their prompts and contain a window of 4,096 recent tokens "
            "in every head. Scaled to a smaller budget, the window shrinks with it. A real budget "
            "of 1,024 tokens has a smaller window and is less balanced than these figures.",
            "- Budgets from head scores do not depend on the length that a model was trained for: "
            "the prompts of the larger budgets exceed it for some models.",
            "- Every slot costs the time of its weights, also an empty one, in every layer. This "
            "is why few rows or small budgets do not pay.",
            "- The cost model counts bytes. All-reduces, launches and sampling are the same for "
            "all strategies and would move whole-step ratios towards 1.",
            "- Gemma-3 and gpt-oss: layers with a sliding window hold their window in every head "
            "and have as many slots as the others; *tokens* counts the other layers only. gpt-oss "
            "and Qwen3-30B-A3B: experts that a batch selects are read once, gpt-oss's in MXFP4. "
            "Qwen3-30B-A3B was measured in pairs of KV heads: pairs are placed, on 2 devices.",
            "- `fairkv_jax` does not serve Gemma-3 and mixtures of experts yet.",
            "",
        ]
    )


def _about_scores(data: Record) -> list[str]:
    """Says how budgets follow from head scores, if there are any."""
    if all(record["scorer"] in SCORERS for record in data["records"]):
        return []
    return [
        f"Head scores ({data['scores_source']}) give heads budgets; prompts are "
        f"{1 / (1 - RATIO):.0f} times as long as the mean budget. DuoAttention: as the engine "
        f"serves it with `kv_policy` `duo_attention` and `kv_ratio` {RATIO}. The heads of the "
        "highest scores keep their whole prompt, as far as the total goes, and the others 128 "
        "sinks and 256 recent tokens. (The paper's own choice, the half of the heads with the "
        "highest scores, keeps more than half of the tokens.) HeadKV: a share of a pool for every "
        f"head, by the paper's formula at {HEADKV_BUDGET:,} tokens, scaled to other budgets.",
        "",
    ]


def _findings(data: Record) -> list[str]:
    """Summarises the tables."""
    row, column = data["batches"].index(SHOWN_BATCH), data["kept"].index(SHOWN_KEPT)
    lines = []
    for devices in sorted({record["devices"] for record in data["records"]}):
        for names, kind in (
            (SCORERS, "retention profiles"),
            (HEAD_SCORES, "tables of head scores"),
        ):
            records = [
                record
                for record in data["records"]
                if record["devices"] == devices and record["scorer"] in names
            ]
            if not records:
                continue
            fair = np.array([step_ratio(record)[row, column] for record in records])
            alone = np.array([step_ratio(record, "best effort")[row, column] for record in records])
            copied = (fair / alone > 1.01).sum()
            lines.append(
                f"- {devices} devices, {SHOWN_BATCH} rows x {SHOWN_KEPT:,} tokens: whole step "
                f"{fair.min():.2f}x to {fair.max():.2f}x of `static` over {len(records)} {kind} "
                f"(median {np.median(fair):.2f}x); without copies {alone.min():.2f}x to "
                f"{alone.max():.2f}x. Copies add more than 1 % in {copied}."
            )
    devices = max(record["devices"] for record in data["records"])
    most = [record for record in data["records"] if record["devices"] == devices]
    by_scorer = {
        name: [step_ratio(r)[row, column] for r in most if r["scorer"] == scorer]
        for scorer, name in SCORERS.items()
    }
    lines.append(
        "- The better a scorer tells heads apart, the more there is to balance; mean of the "
        "models: "
        + ", ".join(f"{name} {np.mean(found):.2f}x" for name, found in by_scorer.items() if found)
        + f" on {devices} devices."
    )
    held = [
        (r["held_out"]["strategies"], step_ratio(r)[row, column])
        for r in data["records"]
        if r["held_out"] and step_ratio(r)[row, column] > 1.01
    ]
    if held:
        kept = [(found[FAIR]["step_ratio"] - 1) / (planned - 1) for found, planned in held]
        lines.append(
            f"- On prompts that the plan has not seen, the median profile keeps "
            f"{np.median(kept):.0%} of the planned gain of the whole step."
        )
    return lines


def _equal_batch_row(record: Record, row: int, column: int) -> str:
    cells = record["equal_batch"]

    def value(name: str, key: str) -> float:
        return cells[name][key][row][column]

    return (
        f"| {record['model']} | {NAMES[record['scorer']]} | {record['devices']} "
        f"| {value('static', 'token_utilization'):.2f} → {value(FAIR, 'token_utilization'):.2f} "
        f"| {value('static', 'utilization'):.2f} → {value(FAIR, 'utilization'):.2f} "
        f"| {value(FAIR, 'attention_ratio'):.2f}x | **{value(FAIR, 'step_ratio'):.2f}x** "
        f"| {value('best effort', 'step_ratio'):.2f}x | {value(FAIR, 'extra_replicas'):.0f} "
        f"| {value(FAIR, 'slots'):.0f} |"
    )


def _by_product(data: Record) -> list[str]:
    tokens = np.outer(data["batches"], data["kept"])
    products = np.unique(tokens)
    lines = [
        "| model | scorer | devices | " + " | ".join(f"{each:,}" for each in products) + " |",
        "|---|---|" + "--:|" * (1 + len(products)),
    ]
    for record in _on_most_devices(data):
        _, ratios = _largest_by_product(step_ratio(record), tokens)
        cells = " | ".join(f"{ratio:.2f}" for ratio in ratios)
        lines.append(
            f"| {record['model']} | {NAMES[record['scorer']]} | {record['devices']} | {cells} |"
        )
    return lines


def _largest_by_product(ratios: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the products batch x kept, and the largest ratio of the cells with each of them.

    Without sliding windows, all cells with a product have the same ratio.
    """
    products = np.unique(tokens)
    return products, np.array([ratios[tokens == each].max() for each in products])


def _memory_rows(record: Record) -> list[str]:
    lines = []
    entries = record["equal_memory"]
    ratios = [entry["strategies"][FAIR]["step_ratio"] for entry in entries]
    scales = bool(ratios) and max(ratios) - min(ratios) < 0.01
    entries = [each for each in entries if each["kept"] in MEMORY_KEPT[-1 if scales else 0 :]]
    for entry in entries:
        found = entry["strategies"]
        static, alone, fair = (found[name] for name in ("static", "best effort", FAIR))
        lines.append(
            f"| {record['model']} | {NAMES[record['scorer']]} | {record['devices']} "
            f"| {entry['kept']:,} | {static['batch']:,} | {fair['batch']:,} "
            f"| {alone['step_ratio']:.2f}x | **{fair['step_ratio']:.2f}x** "
            f"| {fair['attention_ratio']:.2f}x | {fair['extra_replicas']} | {fair['slots']} |"
        )
    return lines


def _held_out_row(record: Record, row: int, column: int) -> str:
    found = record["held_out"]["strategies"]
    fixed = found.get(f"{FAIR}, fixed", found[FAIR])
    return (
        f"| {record['model']} | {NAMES[record['scorer']]} | {record['devices']} "
        f"| {found['static']['utilization']:.2f} | {found['best effort']['utilization']:.2f} "
        f"| {fixed['utilization']:.2f} | {found[FAIR]['utilization']:.2f} "
        f"| {found[FAIR]['attention_ratio']:.2f}x | **{found[FAIR]['step_ratio']:.2f}x** "
        f"| {step_ratio(record)[row, column]:.2f}x |"
    )


def _as_html(line: str) -> str:
    return re.sub("`(.+?)`", r"<code>\1</code>", escape(line))


def page(data: Record, chart: str) -> str:
    """Fills the page with the records; it loads nothing from elsewhere."""
    records = [
        {
            "model": record["model"],
            "scorer": NAMES[record["scorer"]],
            "devices": record["devices"],
            "strategies": record["equal_batch"],
        }
        for record in data["records"]
    ]
    shown = {
        "batches": data["batches"],
        "kept": data["kept"],
        "device_bytes": HARDWARE[data["hardware"]].memory_bytes * data["memory_for_use"],
        "pays": PAYS,
        "first_scorer": list(SCORERS.values())[-1],
        "records": records,
    }
    # "<" in a string would end the script element.
    text = json.dumps(shown).replace("<", "\\u003c")
    source = f"{data['source']}, {data['licence']}"
    about_scores = "".join(f"<p>{_as_html(line)}</p>" for line in _about_scores(data) if line)
    return (
        TEMPLATE.read_text(encoding="utf-8")
        .replace("__DATA__", text)
        .replace("__CHART__", chart)
        .replace("__SOURCE__", escape(source))
        .replace("__SCORES__", about_scores)
    )
