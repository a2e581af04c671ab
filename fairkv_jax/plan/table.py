"""A plan for the terminal: tables for rich."""

from collections.abc import Sequence

import numpy as np
from rich.box import SIMPLE_HEAVY
from rich.table import Table

from fairkv_jax.plan.plan import Layer, Plan
from fairkv_jax.plan.profile import Profile
from fairkv_jax.plan.simulate import Trace


def plan_tables(profile: Profile, chosen: Plan, plans: Sequence[Plan]) -> list[Table]:
    """The strategies beside each other, then the chosen plan layer by layer."""
    return [comparison_table(profile, chosen, plans), layer_table(profile, chosen)]


def comparison_table(profile: Profile, chosen: Plan, plans: Sequence[Plan]) -> Table:
    """One line per strategy; ratios of tokens/s are relative to the first one, `static`.

    "gap" bounds how far the plan is above the best one. "+1 replica" is what one more replica per
    layer would add to the tokens/s. "GiB" is weights and cache on the fullest device.
    """
    table = Table(
        title=f"{profile.model or 'model'}: {profile.num_layers} layers x {profile.num_heads} "
        f"heads on {chosen.num_devices} devices, {chosen.cost.hardware or 'measured cost'}",
        box=SIMPLE_HEAVY,
        padding=(0, 1, 0, 0),
    )
    table.add_column("strategy", no_wrap=True)
    for column in (
        "slots", "replicas", "util", "attn ms", "step ms", "x static", "gap", "+1 replica",
        "batch", "tokens/s", "GiB",
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
    """Heads per device of every layer, with the tokens of one row that they hold."""
    table = Table(title=f"{plan_name(plan)}: heads per device (tokens of a row)")
    table.add_column("layer", justify="right")
    for device in range(plan.num_devices):
        table.add_column(f"device {device}")
    load = np.einsum("lk,lkp->lp", profile.array, plan.shares())
    for index, layer in enumerate(plan.layers):
        cells = [
            f"{_heads(layer, device)} ({load[index, device]:.0f})"
            for device in range(plan.num_devices)
        ]
        table.add_row(str(index), *cells)
    table.add_row("all", *(f"{tokens:,.0f}" for tokens in load.sum(0)), style="bold")
    return table


def simulation_table(routed: Trace, fixed: Trace, batch: int, requests: int) -> Table:
    """What routing by length gives, beside rows that follow the plan's shares blindly."""
    table = Table(title=f"{requests} requests replayed, batch {batch}")
    for column in ("rows go", "utilisation", "token balance", "memory fullest/mean"):
        table.add_column(column)
    for name, trace in (("by load", routed), ("by number", fixed)):
        table.add_row(
            name,
            f"{trace.mean_utilization:.1%}",
            f"{trace.mean_token_balance:.1%}",
            f"{trace.fullest_over_mean.mean():.3f}",
        )
    return table


def plan_name(plan: Plan) -> str:
    """The strategy as one reads it."""
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
