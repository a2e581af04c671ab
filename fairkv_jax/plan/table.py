"""Renders plans as tables for the terminal."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAVY
from rich.table import Table

from fairkv_jax.plan.plan import Layer, Plan
from fairkv_jax.plan.profile import Profile
from fairkv_jax.plan.simulate import Trace


def plan_tables(profile: Profile, chosen: Plan, plans: Sequence[Plan]) -> list[Table]:
    """Returns a table that compares the strategies, and one of the chosen plan's layers."""
    return [comparison_table(profile, chosen, plans), layer_table(profile, chosen)]


def comparison_table(profile: Profile, chosen: Plan, plans: Sequence[Plan]) -> Table:
    """Returns a table with a row per strategy; "x static" is relative to the first plan, `static`.

    "util" is the utilization of time, weights included, and "tokens" that of cached tokens alone.
    "gap" is the plan's maximum distance from the optimum. "+1 replica" is the gain in tokens/s of
    one more replica per layer. "GiB" is the memory for weights and cache on the fullest device. The
    title states the bytes of a cached token per head.
    """
    has_bytes = chosen.cost.token_bytes > 0
    table = Table(
        title=f"{profile.model or 'model'}: {profile.num_layers} layers x {profile.num_heads} "
        f"heads on {chosen.num_devices} devices, {chosen.cost.hardware or 'measured cost'}"
        + (f", {chosen.cost.token_bytes:g} bytes per cached token" if has_bytes else ""),
        box=SIMPLE_HEAVY,
        padding=(0, 1, 0, 0),
    )
    table.add_column("strategy", no_wrap=True)
    for column in (
        "slots", "replicas", "util", "tokens", "attn ms", "step ms", "x static", "gap",
        "+1 replica", "batch", "tokens/s", "GiB",
    ):  # fmt: skip
        table.add_column(column, justify="right", no_wrap=True)
    for plan in plans:
        step = plan.step_seconds + plan.rest_seconds
        speed = plan.tokens_per_second / plans[0].tokens_per_second
        table.add_row(
            plan_name(plan),
            str(plan.slots),
            str(plan.num_extra_replicas),
            f"{plan.utilization:.1%}",
            f"{plan.token_utilization(profile.array):.1%}",
            f"{plan.step_seconds * 1e3:.4g}",
            f"{step * 1e3:.4g}",
            f"{speed:.3f}",
            f"{plan.gap:.2%}",
            f"+{plan.one_more_replica_gain:.2%}",
            str(plan.cost.batch),
            f"{plan.tokens_per_second:,.0f}",
            f"{plan.device_bytes / 2**30:.3g}",
            style="bold" if plan is chosen else None,
        )
    return table


def layer_table(profile: Profile, plan: Plan) -> Table:
    """Returns a table of every layer's heads per device and their cached tokens of one row."""
    table = Table(title=f"{plan_name(plan)}: heads per device (cached tokens of one row)")
    table.add_column("layer", justify="right")
    for device in range(plan.num_devices):
        table.add_column(f"device {device}")
    load = plan.loads(profile.array)
    for index, layer in enumerate(plan.layers):
        cells = [
            f"{_heads(layer, device)} ({load[index, device]:.0f})"
            for device in range(plan.num_devices)
        ]
        table.add_row(str(index), *cells)
    table.add_row("all", *(f"{tokens:,.0f}" for tokens in load.sum(0)), style="bold")
    return table


def simulation_table(routed: Trace, fixed: Trace, batch: int, requests: int) -> Table:
    """Returns a table that compares routing by load with a fixed assignment by row number."""
    table = Table(title=f"{requests} simulated requests, batch {batch}")
    for column in ("rows assigned", "utilization", "token balance", "memory fullest/mean"):
        table.add_column(column)
    for name, trace in (("by load", routed), ("by row number", fixed)):
        table.add_row(
            name,
            f"{trace.mean_utilization:.1%}",
            f"{trace.mean_token_balance:.1%}",
            f"{trace.fullest_over_mean.mean():.3f}",
        )
    return table


def plan_name(plan: Plan) -> str:
    """Returns the strategy's name, with the row split of a strategy that replicates heads."""
    is_replicated = plan.strategy == "fair_copying"
    return f"{plan.strategy}, {plan.row_split}" if is_replicated else plan.strategy


def _heads(layer: Layer, device: int) -> str:
    replicas = [replica for replica in layer if replica.device == device]
    return (
        " ".join(
            str(replica.head) if replica.share > 1 - 1e-9 else f"{replica.head}:{replica.share:.0%}"
            for replica in replicas
        )
        or "-"
    )
