"""The results of the part `parallel` as a table: where balancing pays, and what was predicted."""

from collections.abc import Iterator
from typing import Any

Record = dict[str, Any]
_PLACE = ("model", "profile", "devices", "batch", "mean_tokens", "equal")


def strategies_table(records: list[Record]) -> list[str]:
    """The comparisons, a line each."""
    compared: dict[tuple[Any, ...], dict[str, Record]] = {}
    for record in records:
        # At equal memory, every strategy has a batch of its own.
        batch = record["batch"] if record["equal"] == "batch" else None
        place = tuple(batch if name == "batch" else record[name] for name in _PLACE)
        compared.setdefault(place, {})[record["strategy"]] = record
    lines = [
        "Ratios are tokens/s of the whole step over `static`'s. The KV share of the step is "
        "predicted. Utilization, `static` → Fair-Copying: of tokens, the mean device's over those "
        "of each layer's fullest one; of time, the mean device's measured attention over that of "
        "each layer's slowest one, slots without a head included. As dealt: what the cost model "
        "predicts for the rows as the router dealt them.",
        "",
        "| model | profile | devices | equal | batch x tokens | KV share of static's step "
        "| utilization of tokens | of time | copies, slots | best effort | **Fair-Copying** "
        "| predicted | measured / predicted | as dealt | wall clock |",
        "|---|---|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    return lines + [line for place, found in compared.items() for line in _line(place, found)]


def _line(place: tuple[Any, ...], found: dict[str, Record]) -> Iterator[str]:
    static, fair = found.get("static"), found.get("fair_copying")
    if static is None or fair is None:  # the time was up
        return
    model, profile, devices, _, mean_tokens, equal = place
    alone = found["best_effort"]["tokens_per_second_over_static"]

    def both(name: str) -> str:
        return f"{static[name]:.2f} → {fair[name]:.2f}"

    def ratio(name: str) -> str:
        value = fair.get(f"{name}_over_static")
        return "" if value is None else f"{value:.2f}"

    same = static["batch"] == fair["batch"]
    batch = str(fair["batch"]) if same else f"{static['batch']} → {fair['batch']}"
    cells = (
        model,
        profile,
        devices,
        equal,
        f"{batch} x {mean_tokens:,}",
        f"{static['kv_share']:.0%}",
        both("utilization_of_tokens"),
        both("utilization_of_time"),
        f"{fair['copies']}, {fair['slots']}",
        f"{alone:.2f}",
        f"**{ratio('tokens_per_second')}**",
        ratio("predicted_tokens_per_second"),
        f"{fair['measured_over_predicted']:.2f}",
        ratio("predicted_tokens_per_second_as_dealt"),
        ratio("wall_tokens_per_second"),
    )
    yield "| " + " | ".join(map(str, cells)) + " |"
