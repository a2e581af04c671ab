"""Log lines that describe an engine when it becomes ready."""

from collections.abc import Iterator
from itertools import groupby

from fairkv_jax.plan import Plan
from fairkv_jax.plan.plan import Layer
from fairkv_jax.serve.engine_protocol import Engine

MAX_PLAN_LINES = 40
"""A plan's table with more lines than this is replaced by a summary."""


def describe(engine: Engine) -> list[str]:
    """Returns log lines about the model, the plan and the KV cache."""
    model, run = engine.model_config, engine.engine_config
    return [
        f"model {engine.model_name}: {model.architecture}, {model.num_layers} layers, "
        f"{model.num_heads} query heads, {model.num_kv_heads} KV heads, {run.dtype}, "
        f"context of {run.max_model_len} tokens",
        compression(engine),
        *plan_table(engine.plan),
        f"KV cache: {engine.kv_capacity_tokens:,} tokens in all layers and heads, in "
        f"{run.page_dtype}, enough for "
        f"{engine.kv_capacity_tokens / run.max_model_len:.1f} uncompressed requests of maximum "
        f"length; at most {run.max_num_seqs} requests run concurrently",
    ]


def compression(engine: Engine) -> str:
    """Describes in one phrase how much of a prompt is kept."""
    kv = engine.kv_config
    if kv.allocator_name == "full":
        return "KV policy full: every token is kept"
    name = kv.policy
    if kv.scorer is not None or kv.allocator is not None:
        name = f"{kv.scorer_name} with allocator {kv.allocator_name}"
    if not kv.takes_budget:
        return f"KV policy {name}: as many tokens per head as kv_head_budgets says"
    kept = f"{kv.budget} tokens" if kv.budget else f"{1 - (kv.ratio or 0):.0%} of each prompt"
    return f"KV policy {name}: {kept} per head on average"


def plan_table(plan: Plan) -> list[str]:
    """Returns the heads of every device, one line per run of layers with the same assignment.

    A replicated head is followed by the share of the rows that each replica serves. A table of more
    than MAX_PLAN_LINES lines is replaced by a summary.
    """
    title = (
        f"head plan {plan.strategy}: {plan.num_heads} KV heads on {plan.num_devices} devices, "
        f"utilization {plan.utilization:.1%}"
    )
    runs = list(_runs(plan))
    if len(runs) + 2 > MAX_PLAN_LINES:
        return [title, *_summary(plan, len(runs))]
    devices = range(plan.num_devices)
    rows = [["layers", *(f"device {device}" for device in devices)]]
    for layers, heads in runs:
        rows.append([layers, *heads])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return [title, *(f"  {line}" for line in lines)]


def _summary(plan: Plan, num_assignments: int) -> list[str]:
    replicated = int((plan.replicas().sum(2) > 1).sum())
    return [
        f"  {plan.num_layers} layers with {num_assignments} different runs of assignments, "
        f"{plan.slots} head slots per device",
        f"  {plan.num_extra_replicas} extra replicas for {replicated} of "
        f"{plan.num_layers * plan.num_heads} heads, at most "
        f"{max(map(len, plan.layers)) - plan.num_heads} per layer",
        "  GET /plan returns the assignment of every layer, and the page at / shows it",
    ]


def _runs(plan: Plan) -> Iterator[tuple[str, list[str]]]:
    written = [_heads_by_device(layer, plan.num_devices) for layer in plan.layers]
    for heads, run in groupby(enumerate(written), key=lambda item: item[1]):
        layers = [layer for layer, _ in run]
        yield (f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else f"{layers[0]}"), heads


def _heads_by_device(layer: Layer, num_devices: int) -> list[str]:
    heads: list[list[str]] = [[] for _ in range(num_devices)]
    for replica in sorted(layer, key=lambda replica: replica.head):
        share = "" if replica.share == 1 else f" ({replica.share:.0%})"
        heads[replica.device].append(f"{replica.head}{share}")
    return [" ".join(device) or "-" for device in heads]
