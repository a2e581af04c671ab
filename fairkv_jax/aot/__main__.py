"""Compiles the decode step and a prefill for GPUs, without a GPU, and prints their resources.

    python -m fairkv_jax.aot --model llama-3.3-70b --target h200 --devices 8 --batch 64 \\
        --kv-budget 1024 --head-plan fair_copying
    python -m fairkv_jax.aot --kernels --target h100 --attention-backend mosaic

The second command compiles only the kernels of decode attention, for all supported shapes. The exit
status is 1 if a step does not fit into memory, copies the KV pool, spills registers, takes longer
than --timeout-s to compile, or if a decode step moves more than 1 % of the weights' bytes without
computing with them, and 2 if parts of the compiler are missing or its assembler fails.
"""

import faulthandler
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Must precede the import of JAX, whose CUDA plugin otherwise requires a driver.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from absl import app, flags

from fairkv_jax.aot.kernels import compile_all
from fairkv_jax.aot.launches import Launches
from fairkv_jax.aot.report import MAX_MOVED_SHARE, AssemblerError, Report, compile_and_report
from fairkv_jax.aot.steps import (
    Setup,
    config_of,
    device_bytes,
    lower_decode_step,
    lower_prefill,
)
from fairkv_jax.aot.targets import Target, find_ptxas, missing_parts, targets
from fairkv_jax.command_line import engine_flag, with_underscores
from fairkv_jax.config import KVConfig
from fairkv_jax.pallas.ragged_decode import AUTO, BACKENDS, is_kind
from fairkv_jax.plan import HARDWARE, SHAPES, STRATEGIES, CostModel, Plan, Profile, make_plan
from fairkv_jax.profile import synthetic_profile

DEMO = "demo"
_DEMO_SHAPE = "smollm2-135m"

_MODEL = flags.DEFINE_enum("model", "llama-3.3-70b", [DEMO, *SHAPES], "Shape of the model.")
_TARGET = flags.DEFINE_enum("target", "h200", list(targets()), "Kind of GPU.")
_DEVICES = flags.DEFINE_integer("devices", 8, "Number of GPUs in one host.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch", 64, "Rows of the decode batch.", lower_bound=1)
_BUDGET = engine_flag("kv_budget", default=1024)
_PROMPT = flags.DEFINE_integer(
    "prompt_tokens", 2048, "Prompt tokens of the prefill; 0: compile no prefill."
)
_NEW = flags.DEFINE_integer("new_tokens", 256, "Maximum generated tokens per row.")
_LONGEST = engine_flag("max_model_len", default=8192)
_PAGE = engine_flag("page_size")
_KV_DTYPE = engine_flag("kv_cache_dtype")
_PLAN = engine_flag("head_plan")
_PROFILE = flags.DEFINE_string(
    "profile", None, "Path of a head profile in JSON; default: a synthetic one."
)
_IMBALANCE = flags.DEFINE_float(
    "imbalance", 0.6, "Imbalance (std / mean of tokens per head) of the synthetic profile."
)
_KERNELS = flags.DEFINE_bool("kernels", False, "Compile only the decode kernels, for all shapes.")
_TIMEOUT = flags.DEFINE_integer("timeout_s", 900, "Maximum seconds to compile one step.")
_BACKEND = flags.DEFINE_enum(
    "attention_backend", AUTO, BACKENDS, "Backend of decode attention to compile."
)

_LISTED_SHARE = 0.001

_ARGUMENTS = {
    "decode": "weights, KV pool, page table",
    "prefill": "weights, one layer's keys and values",
    "compression": "one layer's keys and values",
}


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    missing = missing_parts()
    if missing:
        print(f"cannot compile for GPUs on this machine: {missing}", file=sys.stderr)
        sys.exit(2)
    target = targets()[_TARGET.value]
    print(f"registers and spills by {find_ptxas()}")
    try:
        sys.exit(print_kernels(target) if _KERNELS.value else print_steps(target))
    except AssemblerError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def print_steps(target: Target) -> int:
    """Prints the resources of every step, and returns 1 if a check fails."""
    setup = make_setup(target)
    mesh = target.mesh(_DEVICES.value)
    pool = setup.pool_elements
    weights = device_bytes(setup.shapes(mesh).model)
    print(_header(setup, target, weights))
    steps = {"decode": lower_decode_step(setup, mesh)}
    if _PROMPT.value:
        kv_config = KVConfig("ada_snapkv", budget=_BUDGET.value)
        steps |= lower_prefill(setup, mesh, _PROMPT.value, kv_config)
    ok = True
    for name, lowered in steps.items():
        with timeout(_TIMEOUT.value):
            report = compile_and_report(lowered, target.architecture)
        # The KV pool also occupies memory during a prefill.
        beside = 0 if name == "decode" else setup.cache.pool_bytes_per_device
        total = report.argument_bytes + report.temporary_bytes + report.new_output_bytes + beside
        # A copy of a quarter of the pool is already too large.
        copies = report.copies_of(pool // 4) if name == "decode" else []
        print(_lines(name, report, copies, total, target))
        moved = report.moved_bytes(setup.logits_move_bytes)
        print(_moved_lines(report, moved, weights))
        ok &= total <= target.memory_bytes and not copies and not report.spilling
        ok &= name != "decode" or moved <= MAX_MOVED_SHARE * weights
    return 0 if ok else 1


def print_kernels(target: Target) -> int:
    """Prints a table of registers and spilled bytes, and returns 1 if a kernel spills."""
    print(f"{target.architecture}, {_BACKEND.value}, KV cache {_KV_DTYPE.value}\n")
    print("type | head_dim | group | registers, spilled bytes\n--- | --- | --- | ---")
    spilling = False
    for dtype, head_dim, group, report in compile_all(_BACKEND.value, target, _KV_DTYPE.value):
        said = report
        if isinstance(report, Report):
            said = "; ".join(f"{k.name} {k.registers}, {k.spill_bytes}" for k in report.own_kernels)
            spilling |= bool(report.spilling)
        print(f"{dtype} | {head_dim} | {group} | {said}", flush=True)
    return int(spilling)


@contextmanager
def timeout(seconds: int) -> Iterator[None]:
    """Ends the process and prints the stacks of its threads if the body takes longer.

    XLA's compiler cannot be interrupted from Python, and in rare cases it does not terminate.
    """
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def make_setup(target: Target) -> Setup:
    """Makes the setup that the flags describe."""
    shape = SHAPES[_DEMO_SHAPE if _MODEL.value == DEMO else _MODEL.value]
    name = _DEMO_SHAPE if _MODEL.value == DEMO else _MODEL.value
    if _PROFILE.value:
        profile = Profile.from_json(Path(_PROFILE.value).read_text())
        profile.check_model(shape.num_layers, shape.num_kv_heads, name)
    else:
        profile = synthetic_profile(shape, _BUDGET.value, model=name, imbalance=_IMBALANCE.value)
    if _PLAN.value in STRATEGIES:
        kind = target.name.upper()
        hardware = next((name for name in HARDWARE if is_kind(name, kind)), "H100")
        cost = CostModel.of(
            shape,
            _DEVICES.value,
            hardware,
            batch=_BATCH.value,
            kv_cache_dtype=_KV_DTYPE.value,
        )
        plan = make_plan(profile, _DEVICES.value, _PLAN.value, cost=cost)
    else:
        plan = Plan.from_json(Path(_PLAN.value).read_text())
    return Setup(
        config_of(shape, tie_word_embeddings=name == _DEMO_SHAPE),
        plan,
        profile,
        _BATCH.value,
        max_model_len=_LONGEST.value,
        new_tokens=_NEW.value,
        page_size=_PAGE.value,
        kv_cache_dtype=_KV_DTYPE.value,
        attention_backend=_BACKEND.value,
    )


def _header(setup: Setup, target: Target, weights: int) -> str:
    plan = setup.plan
    return (
        f"{_MODEL.value} on {plan.num_devices} x {target.name}, batch {setup.batch}, "
        f"{plan.strategy}: {plan.slots} slots per layer and device, "
        f"{plan.num_extra_replicas} extra replicas, utilization {plan.utilization:.3f}\n"
        f"per device:\n"
        f"  weights          {_gib(weights)}\n"
        f"  KV pool          {_gib(setup.cache.pool_bytes_per_device)}  in "
        f"{setup.cache.pages_per_device} "
        f"pages of {setup.page_size} tokens, for {_BUDGET.value} + {setup.new_tokens} tokens "
        "per head\n"
        f"  page tables      {_gib(setup.cache.table_bytes_per_device)}"
    )


def _lines(name: str, report: Report, copies: list[str], total: int, target: Target) -> str:
    kernels = [f"{k.name} {k.registers} registers" for k in report.own_kernels]
    widest = max(report.kernels, key=lambda kernel: kernel.registers)
    spills = [f"{k.name} {k.spill_bytes} bytes" for k in report.spilling]
    calls = ", ".join(f"{count} {kind}" for kind, count in report.collectives.items())
    fits = "fits" if total <= target.memory_bytes else "DOES NOT FIT"
    return "\n".join(
        [
            f"{name}, compiled in {report.compile_seconds:.1f} s, per device:",
            f"  arguments        {_gib(report.argument_bytes)}  {_ARGUMENTS[name]}",
            f"  temporaries      {_gib(report.temporary_bytes)}",
            f"  new outputs      {_gib(report.new_output_bytes)}",
            f"  total            {_gib(total)}  of {_gib(target.memory_bytes)}: {fits}",
            f"  kernels          {', '.join(kernels) or 'none of this project'}; of all "
            f"{len(report.kernels)}, {widest.name} uses the most registers: {widest.registers}",
            f"  spills           {', '.join(spills) or 'none'}",
            f"  collectives      {calls or 'none'}",
            f"  launches         {_launches(report.launches)}",
            *(f"  COPY OF THE POOL {line[:200]}" for line in copies),
        ]
    )


def _launches(launches: Launches | None) -> str:
    if launches is None:
        return "not told by this version of XLA"
    return (
        f"{launches.graphs} CUDA graphs of {launches.in_graphs} kernels, copies and library calls, "
        f"and {launches.alone} outside of graphs"
    )


def _moved_lines(report: Report, moved: int, weights: int) -> str:
    """The bytes that are moved, and what moves a thousandth of the weights or more."""
    listed = [move for move in report.moves if move.total_bytes > _LISTED_SHARE * weights]
    all_moved = report.moved_bytes()
    return "\n".join(
        [
            f"  moved            {moved / 1e6:.1f} MB, {moved / weights:.2%} of the weights, and "
            f"{(all_moved - moved) / 1e6:.1f} MB of logits",
            *(
                f"    {move.total_bytes / 1e6:.1f} MB in {move.calls} calls: {move.line[:100]}"
                for move in listed
            ),
        ]
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:8.3f} GiB"


if __name__ == "__main__":
    app.run(main, [with_underscores(argument) for argument in sys.argv])
