"""Compares planning strategies on published head profiles and head scores, by the cost model.

    python -m benchmarks.balance --profiles DIR --scores DIR

Writes balance.json, and from it balance.md (tables), balance.html (a page that answers whether
balancing pays for a model, a batch and a budget) and balance.svg (its overview). The profiles are
measured, the times are predictions of the cost model. The comparison takes long: `--reuse` compares
only what balance.json lacks, and `--render_only` compares nothing.
"""

import json
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from absl import app, flags
from tqdm import tqdm

from benchmarks.balance.compare import BATCHES, KEPT, MEMORY_FOR_USE, compare, mean_kept
from benchmarks.balance.published import (
    LICENCE,
    SCORES_SOURCE,
    SOURCE,
    Published,
    read_profiles,
    read_scores,
)
from benchmarks.balance.render import overview, page, tables
from fairkv_jax.plan import HARDWARE

_PROFILES = flags.DEFINE_string(
    "profiles", None, "Folder of published profiles, MODEL__SCORER.npz with kept [prompts, L, K]."
)
_SCORES = flags.DEFINE_string(
    "scores", None, "Folder of head scores, duoattention_MODEL.tsv and headkv_MODEL_KIND_heads.tsv."
)
_DEVICES = flags.DEFINE_list("devices", ["2", "4", "8"], "Numbers of devices.")
_HARDWARE = flags.DEFINE_enum("hardware", "H100", list(HARDWARE), "Hardware of the cost model.")
_OUTPUT = flags.DEFINE_string("output_dir", "benchmarks/results", "Folder for the results.")
_JOBS = flags.DEFINE_integer("jobs", 1, "Processes that compare profiles at the same time.")
_REUSE = flags.DEFINE_bool(
    "reuse", False, "Take what balance.json in the output folder has, and compare only the rest."
)
_RENDER_ONLY = flags.DEFINE_bool(
    "render_only", False, "Read balance.json in the output folder instead of comparing."
)


def measure(
    folder: Path,
    scores_folder: Path | None,
    devices: list[int],
    hardware: str,
    jobs: int,
    known: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Compares the strategies on all files of the folders; returns the record of balance.json.

    Args:
        known: an earlier record, whose comparisons are taken as they are.

    Raises:
        ValueError: a folder or a file is wrong, or `known` was made with other settings.
    """
    profiles = list(read_profiles(folder))
    scores = list(read_scores(scores_folder)) if scores_folder else []
    head = {
        "source": SOURCE,
        "licence": LICENCE,
        "scores_source": SCORES_SOURCE,
        "hardware": hardware,
        "memory_for_use": MEMORY_FOR_USE,
        "batches": list(BATCHES),
        "kept": list(KEPT),
    }
    records = {}
    if known is not None:
        for name in ("hardware", "memory_for_use", "batches", "kept"):
            if known[name] != head[name]:
                raise ValueError(
                    f"{name} of balance.json is {known[name]}, not {head[name]}: compare everything"
                    " again, without --reuse"
                )
        records = {
            (each["model"], each["scorer"], each["devices"]): each for each in known["records"]
        }
    wanted = {
        (each.model.name, each.scorer, count): (each, count)
        for each in (*profiles, *scores)
        for count in devices
        if count <= each.model.units
    }
    missing = {key: setting for key, setting in wanted.items() if key not in records}
    with ProcessPoolExecutor(jobs) as pool:
        done = pool.map(partial(_compare, hardware=hardware), missing.values())
        done = tqdm(done, total=len(missing), desc="profiles x devices")
        records |= zip(missing, done, strict=True)
    return head | {
        "records": [records[key] for key in wanted],
        "mean_kept": {f"{each.model.name}, {each.scorer}": mean_kept(each) for each in profiles},
    }


def _compare(setting: tuple[Published, int], hardware: str) -> dict[str, Any]:
    return compare(*setting, hardware)


def main(arguments: list[str]) -> None:
    del arguments
    folder = Path(_OUTPUT.value)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "balance.json"
    if not _RENDER_ONLY.value:
        if not _PROFILES.value:
            raise app.UsageError("--profiles is required: the folder of the published profiles")
        try:
            record = measure(
                Path(_PROFILES.value),
                Path(_SCORES.value) if _SCORES.value else None,
                [int(count) for count in _DEVICES.value],
                _HARDWARE.value,
                _JOBS.value,
                json.loads(file.read_text("utf-8")) if _REUSE.value and file.exists() else None,
            )
        except ValueError as error:
            raise SystemExit(f"error: {error}") from None
        file.write_text(json.dumps(record) + "\n", encoding="utf-8")
    record = json.loads(file.read_text(encoding="utf-8"))
    chart = overview(record)
    for name, text in (
        ("balance.md", tables(record)),
        ("balance.svg", chart),
        ("balance.html", page(record, chart)),
    ):
        (folder / name).write_text(text, encoding="utf-8")
    print(f"balance.json, balance.md, balance.svg and balance.html written to {folder}")


if __name__ == "__main__":
    app.run(main)
