"""What the log says about an engine that has just become ready."""

from collections.abc import Iterator
from itertools import groupby

from fairkv_jax.plan import Plan
from fairkv_jax.plan.plan import Layer
from fairkv_jax.serve.async_engine import Engine


def describe(engine: Engine) -> list[str]:
    """The model, the plan as a table, and the cache: lines for the log."""
    model, run = engine.model_config, engine.engine_config
    return [
        f"model {engine.model_name}: {model.architecture}, {model.num_layers} layers, "
        f"{model.num_heads} query heads, {model.num_kv_heads} KV heads, {run.dtype}, "
        f"context of {run.max_model_len} tokens",
        compression(engine),
        *plan_table(engine.plan),
        f"KV cache: {engine.kv_capacity_tokens:,} tokens of a sequence in all layers and heads, "
        f"that is {engine.kv_capacity_tokens / run.max_model_len:.1f} requests of full length "
        f"without compression; {run.max_num_seqs} requests run at a time",
    ]


def compression(engine: Engine) -> str:
    """What is kept of a prompt, in a phrase."""
    kv = engine.kv_config
    if kv.policy == "full":
        return "KV policy full: every token is kept"
    kept = f"{kv.budget} tokens" if kv.budget else f"{1 - (kv.ratio or 0):.0%} of each prompt"
    return f"KV policy {kv.policy}: {kept} a head on average"


def plan_table(plan: Plan) -> list[str]:
    """The heads of every device, one row for each run of layers that share an assignment.

    A head with several copies is written with the share of the rows that each of them serves.
    """
    devices = range(plan.num_devices)
    rows = [["layers", *(f"device {device}" for device in devices)]]
    for layers, heads in _runs(plan):
        rows.append([layers, *heads])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    title = f"head plan {plan.strategy}: {plan.num_heads} KV heads on {plan.num_devices} devices"
    return [f"{title}, utilisation {plan.utilization:.1%}", *(f"  {line}" for line in lines)]


def _runs(plan: Plan) -> Iterator[tuple[str, list[str]]]:
    written = [_heads_by_device(copies, plan.num_devices) for copies in plan.layers]
    for heads, run in groupby(enumerate(written), key=lambda item: item[1]):
        layers = [layer for layer, _ in run]
        yield (f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else f"{layers[0]}"), heads


def _heads_by_device(copies: Layer, num_devices: int) -> list[str]:
    heads: list[list[str]] = [[] for _ in range(num_devices)]
    for copy in sorted(copies, key=lambda copy: copy.head):
        share = "" if copy.share == 1 else f" ({copy.share:.0%})"
        heads[copy.device].append(f"{copy.head}{share}")
    return [" ".join(device) or "-" for device in heads]
