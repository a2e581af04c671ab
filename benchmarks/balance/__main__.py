"""Compares planning strategies on published head profiles and head scores, by the cost model.

    python -m benchmarks.balance --profiles DIR --scores DIR

Writes balance.json, and from it balance.md (tables), balance.html (a page that answers whether
balancing pays for a model, a batch and a budget) and balance.svg (its overview). The profiles are
measured, the times are predictions of the cost model. The comparison takes long: `--reuse` compares
only what balance.json lacks, and `--render_only` compares nothing.
"""

import json
from pathlib import Path

from absl import app, flags

from benchmarks.balance.measure import measure
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
