"""Compares what our engine keeps with what kvpress kept.

    python -m benchmarks.kvpress_parity.compare --recorded kept.npz

`record` wrote the file. Prints a table in Markdown: positions that kvpress keeps, and how many of
them the engine replaces by others. Scores that are equal up to rounding may be ranked differently.
"""

import sys
from pathlib import Path

from absl import app, flags

from benchmarks.kvpress_parity.cases import (
    CASE_NAMES,
    CASES,
    SIZES,
    Case,
    Recorded,
    Size,
    num_differing,
)
from benchmarks.kvpress_parity.engine import keep
from fairkv_jax.checkpoint.fetch import DEMO_MODEL
from fairkv_jax.command_line import engine_flag, with_underscores

_MODEL = engine_flag("model")
_RECORDED = flags.DEFINE_string("recorded", None, "Path of the recorded sets.", required=True)
_CASES = flags.DEFINE_multi_enum("cases", CASE_NAMES, CASE_NAMES, "Cases to compare.")

HEADER = (
    "| method | allocator | size | prompts | positions | differing | share |",
    "|---|---|---|---:|---:|---:|---:|",
)


def main(_argv: list[str]) -> None:
    recorded = Recorded.load(Path(_RECORDED.value))
    about = ", ".join(f"{name} {version}" for name, version in recorded.versions.items())
    lengths = ", ".join(str(len(ids)) for ids in recorded.prompts)
    print(f"{about}; float32 on CPU; prompts of {lengths} tokens.\n")
    print(*HEADER, sep="\n")
    there = {(case, size) for case, size, _ in recorded.kept}
    for case in (case for case in CASES if case.name in _CASES.value):
        for size in (size for size in SIZES if (case.name, size.name) in there):
            print(row(case, size, recorded), flush=True)


def row(case: Case, size: Size, recorded: Recorded) -> str:
    """Runs the engine on one case and returns its line of the table."""
    start = f"| {case.method}{f', epsilon {case.epsilon:g}' if case.epsilon else ''} "
    start += f"| {case.allocator} | {size.name} "
    kept = keep(_MODEL.value or DEMO_MODEL, case, size, recorded)
    wanted = {index: recorded.kept[case.name, size.name, index] for index in kept}
    positions = sum(int(want.sum()) for want in wanted.values())
    differing = sum(num_differing(kept[index], want) for index, want in wanted.items())
    return f"{start}| {len(kept)} | {positions} | {differing} | {differing / positions:.3%} |"


if __name__ == "__main__":
    app.run(main, argv=[with_underscores(argument) for argument in sys.argv])
