"""Compares what our engine keeps with what kvpress kept.

    python -m benchmarks.kvpress_parity.compare --recorded kept.npz

`record` wrote the file. Prints a table in Markdown: positions that kvpress keeps, and how many of
them the engine replaces by others. Scores that are equal up to rounding may be ranked differently.
"""

import sys
from pathlib import Path
from typing import Any

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
    try:
        kept = keep(case, size, recorded)
    except (TypeError, ValueError) as error:
        return f"{start}| | | | {error} |"
    wanted = {index: recorded.kept[case.name, size.name, index] for index in kept}
    positions = sum(int(want.sum()) for want in wanted.values())
    differing = sum(num_differing(kept[index], want) for index, want in wanted.items())
    return f"{start}| {len(kept)} | {positions} | {differing} | {differing / positions:.3%} |"


def keep(case: Case, size: Size, recorded: Recorded) -> dict[int, Any]:
    """Returns the positions [L, K, T], bool, that the engine keeps of each recorded prompt."""
    import numpy as np

    from fairkv_jax import LLM, SamplingParams
    from fairkv_jax.checkpoint.fetch import DEMO_MODEL

    indices = [
        i for i in range(len(recorded.prompts)) if (case.name, size.name, i) in recorded.kept
    ]
    llm = LLM(
        _MODEL.value or DEMO_MODEL,
        dtype="float32",
        max_model_len=max(map(len, recorded.prompts)) + 1,
        max_num_seqs=1,
        progress=False,
        **case.options,
        **size.options,
    )
    prompts = [recorded.prompts[i] for i in indices]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=1), return_kept_positions=True)
    kept = {}
    for index, output in zip(indices, outputs, strict=True):
        kept[index] = np.zeros((*recorded.shape, len(output.prompt_token_ids)), bool)
        for layer, heads in enumerate(output.kept_positions or []):
            for head, positions in enumerate(heads):
                kept[index][layer, head, positions] = True
    return kept


if __name__ == "__main__":
    app.run(main, argv=[with_underscores(argument) for argument in sys.argv])
