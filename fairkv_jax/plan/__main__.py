"""`python -m fairkv_jax.plan`: makes a head plan from a profile, then prints and saves it."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from absl import flags
from rich.console import Console

from fairkv_jax.command_line import with_underscores
from fairkv_jax.config import KV_CACHE_DTYPES
from fairkv_jax.plan.cost import HARDWARE, MAX_BATCH, OBJECTIVES
from fairkv_jax.plan.make import ROW_SPLITS, STRATEGIES, default_cost, make_plan
from fairkv_jax.plan.plan import Plan
from fairkv_jax.plan.profile import Profile
from fairkv_jax.plan.report import report_page
from fairkv_jax.plan.shape import find_shape
from fairkv_jax.plan.simulate import Workload, simulate
from fairkv_jax.plan.table import plan_name, plan_tables, simulation_table

COMPARED = (
    ("static", "equal"),
    ("best_effort", "equal"),
    ("fair_copying", "equal"),
    ("fair_copying", "proportional"),
)
GIB = 1 << 30
PICTURES = (".svg", ".png", ".pdf")
DEPRECATED_FLAGS = {"--max_copies": "--max_extra_replicas"}


def define_flags() -> flags.FlagValues:
    """Defines the flags in a separate registry, so that importing this module defines none."""
    values = flags.FlagValues()
    flags.DEFINE_string("profile", None, "Path of the head profile (JSON).", flag_values=values)
    flags.DEFINE_integer(
        "devices", 2, "Number of devices that share each layer.", flag_values=values
    )
    flags.DEFINE_enum(
        "strategy", "fair_copying", STRATEGIES, "Planning strategy.", flag_values=values
    )
    flags.DEFINE_enum(
        "row_split", "equal", ROW_SPLITS,
        "How the rows of a replicated head are divided among its replicas.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer(
        "max_extra_replicas", None,
        "Maximum replicas per layer beyond one per head; default: limited by the slots only.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer(
        "max_slots", None, "Maximum heads per device and layer.", flag_values=values
    )
    flags.DEFINE_enum(
        "objective", "latency", OBJECTIVES,
        "Minimise the step time (latency), or maximise tokens/s (throughput).",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer(
        "batch", None,
        "Rows of the decode batch, for the objective latency; default: as many as the hardware's "
        f"memory holds, at most {MAX_BATCH}.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_float(
        "device_memory", None,
        "GiB per device for weights and KV cache; default: no limit with the objective latency, "
        "the hardware's memory with throughput.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_enum(
        "hardware", "H100", list(HARDWARE), "Hardware of the cost model.", flag_values=values
    )
    flags.DEFINE_integer(
        "itemsize", 2,
        "Bytes per weight, and per element of the KV cache unless --kv_cache_dtype is int8.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_enum(
        "kv_cache_dtype", "auto", KV_CACHE_DTYPES,
        "Type of the KV cache. auto: elements of --itemsize. int8: one byte per element, and a "
        "scale for the key and one for the value of each token.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer(
        "effort", 1, "Work of the exact solver; 0: heuristics only.", flag_values=values
    )
    flags.DEFINE_integer(
        "simulate", 0,
        "Number of requests to simulate, drawn from the profile's prompts; 0: no simulation.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string("output", None, "Path of the plan (JSON) to write.", flag_values=values)
    flags.DEFINE_string(
        "report", None,
        "Path of the report to write: a page, or with the ending .svg, .png or .pdf a picture of "
        "how long devices wait with every strategy, which needs matplotlib.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_bool("help", False, "Print this page and exit.", flag_values=values)
    return values


def parse(arguments: list[str]) -> flags.FlagValues:
    """Parses the command line; --row-split and --row_split are the same flag.

    Raises:
        ValueError: a flag is unknown, a value is invalid, or --profile is missing.
    """
    values = define_flags()
    names = [_current_name(with_underscores(argument)) for argument in arguments]
    try:
        rest = values(["plan", *names])[1:]
    except flags.Error as error:
        raise ValueError(str(error)) from None
    if rest:
        raise ValueError(f"unexpected argument {rest[0]!r}")
    if not values.help and not values.profile:
        raise ValueError(
            "--profile is required: give a JSON file written by python -m fairkv_jax.profile"
        )
    return values


def _current_name(argument: str) -> str:
    """Replaces the name of a deprecated flag and prints a warning to stderr."""
    name, equals, value = argument.partition("=")
    if name not in DEPRECATED_FLAGS:
        return argument
    new = DEPRECATED_FLAGS[name]
    print(f"warning: {name} is deprecated, use {new} instead", file=sys.stderr)
    return f"{new}{equals}{value}"


def run(values: flags.FlagValues, console: Console) -> None:
    """Plans with every strategy, prints the comparison, and writes the requested files."""
    profile = Profile.from_json(Path(values.profile).read_text(encoding="utf-8"))
    cost = default_cost(
        profile,
        values.devices,
        values.hardware,
        batch=values.batch,
        itemsize=values.itemsize,
        kv_cache_dtype=values.kv_cache_dtype,
    )
    memory = None if values.device_memory is None else values.device_memory * GIB
    if values.objective == "throughput" and memory is None:
        memory = HARDWARE[values.hardware].memory_bytes

    def plan_with(strategy: str, row_split: str) -> Plan:
        return make_plan(
            profile,
            values.devices,
            strategy,
            row_split=row_split,
            max_extra_replicas=values.max_extra_replicas,
            max_slots=values.max_slots,
            device_bytes=memory,
            objective=values.objective,
            cost=cost,
            effort=values.effort,
        )

    chosen = plan_with(values.strategy, values.row_split)
    others = _compare(plan_with, chosen)
    for table in plan_tables(profile, chosen, others):
        console.print(table)
    if profile.shape is None and find_shape(profile.model) is None:
        console.print(
            "The model's shape is unknown: the cost model counts cached tokens only, not weights."
        )
    if values.simulate:
        console.print(_simulated(profile, chosen, values.simulate))
    if values.output:
        Path(values.output).write_text(chosen.to_json(), encoding="utf-8")
        console.print(f"plan written to {values.output}")
    if values.report:
        _write_report(Path(values.report), profile, chosen, others)
        console.print(f"report written to {values.report}")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status; errors are one line on stderr."""
    try:
        values = parse(sys.argv[1:] if arguments is None else arguments)
        if values.help:
            print(__doc__, values.get_help(), sep="\n")
            return 0
        # Tables are not wrapped to 80 columns if the output goes to a file or a pipe.
        run(values, Console(width=None if sys.stdout.isatty() else 120))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _write_report(path: Path, profile: Profile, chosen: Plan, plans: list[Plan]) -> None:
    """Writes a page, or where the file's name says so a picture.

    Raises:
        ValueError: a picture is asked for without matplotlib.
    """
    if path.suffix not in PICTURES:
        path.write_text(report_page(profile, chosen, plans), encoding="utf-8")
        return
    try:
        from fairkv_jax.viz.devices import waiting
    except ImportError as error:
        raise ValueError(
            f"--report {path} needs matplotlib ({error}): pip install 'fairkv-jax[viz]', or give "
            "a name that ends in .html"
        ) from None
    waiting({plan_name(plan): plan.loads(profile.array) for plan in plans}).savefig(path)


def _compare(plan_with: Callable[[str, str], Plan], chosen: Plan) -> list[Plan]:
    """Makes a plan per strategy within the same limits; leaves out those that cannot meet them."""
    plans = []
    for strategy, row_split in COMPARED:
        if strategy == chosen.strategy and row_split == chosen.row_split:
            plans.append(chosen)
            continue
        try:
            plans.append(plan_with(strategy, row_split))
        except ValueError:
            continue
    return plans if chosen in plans else [*plans, chosen]


def _simulated(profile: Profile, plan: Plan, requests: int):
    if profile.samples is None:
        raise ValueError(
            "--simulate needs a profile that contains the kept tokens of each prompt: measure one "
            "with python -m fairkv_jax.profile"
        )
    workload = Workload.drawn(np.array(profile.samples), requests, rate=1.0, new_tokens=64)
    batch = plan.cost.batch
    routed, fixed = (simulate(plan, workload, batch, routed=routed) for routed in (True, False))
    return simulation_table(routed, fixed, batch, requests)


if __name__ == "__main__":
    sys.exit(main())
