"""Compares all published profiles and head scores of some folders."""

from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

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
