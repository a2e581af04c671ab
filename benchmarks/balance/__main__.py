"""Compares planning strategies on published head profiles, by the cost model.

    python -m benchmarks.balance --profiles DIR

Writes balance.json, and from it balance.md (tables), balance.html (a page that answers whether
balancing pays for a model, a batch and a budget) and balance.svg (its overview). The profiles are
measured, the times are predictions of the cost model. `--render_only` skips the comparison, which
takes minutes, and reads balance.json.
"""

import json
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from absl import app, flags
from tqdm import tqdm

from benchmarks.balance.compare import BATCHES, KEPT, MEMORY_FOR_USE, compare, mean_kept
from benchmarks.balance.published import LICENCE, SOURCE, PublishedProfile, read_profiles
from benchmarks.balance.render import overview, page, tables
from fairkv_jax.plan import HARDWARE

_PROFILES = flags.DEFINE_string(
    "profiles", None, "Folder of published profiles, MODEL__SCORER.npz with kept [prompts, L, K]."
)
_DEVICES = flags.DEFINE_list("devices", ["2", "4", "8"], "Numbers of devices.")
_HARDWARE = flags.DEFINE_enum("hardware", "H100", list(HARDWARE), "Hardware of the cost model.")
_OUTPUT = flags.DEFINE_string("output_dir", "benchmarks/results", "Folder for the results.")
_JOBS = flags.DEFINE_integer("jobs", 1, "Processes that compare profiles at the same time.")
_RENDER_ONLY = flags.DEFINE_bool(
    "render_only", False, "Read balance.json in the output folder instead of comparing."
)


def measure(folder: Path, devices: list[int], hardware: str, jobs: int) -> dict[str, Any]:
    """Compares the strategies on all profiles in a folder; returns the record of balance.json."""
    profiles = list(read_profiles(folder))
    settings = [
        (each, count) for each in profiles for count in devices if count <= each.model.units
    ]
    with ProcessPoolExecutor(jobs) as pool:
        done = pool.map(partial(_compare, hardware=hardware), settings)
        records = list(tqdm(done, total=len(settings), desc="profiles x devices"))
    return {
        "source": SOURCE,
        "licence": LICENCE,
        "hardware": hardware,
        "memory_for_use": MEMORY_FOR_USE,
        "batches": BATCHES,
        "kept": KEPT,
        "records": records,
        "mean_kept": {f"{each.model.name}, {each.scorer}": mean_kept(each) for each in profiles},
    }


def _compare(setting: tuple[PublishedProfile, int], hardware: str) -> dict[str, Any]:
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
                [int(count) for count in _DEVICES.value],
                _HARDWARE.value,
                _JOBS.value,
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
