"""What the kernels and the plans do on this GPU, in one command of under 8 minutes.

    python -m benchmarks.gpu_suite --output benchmarks/results

Writes <output>/<device>/gpu_suite.json and .md after every figure, so that a run that is cut short
keeps what it measured; a part that takes longer than its share of the time ends with what it has.
"checks" holds the figures against what is asked of them. Ends with 1 where a backend computes wrong
numbers or a part fails, and with 2 where there is no GPU. `--parts tune` searches tiles and writes
tiles.json, a candidate for the kernels' devices/.

`--profiles DIR` makes the part "parallel" measure published head profiles, in the files that
`benchmarks.balance` reads. `--checkpoint-parts DIR` joins the demo model, which the parts "serve"
and "demo" run, where only small files arrive. `--cpu` measures on a CPU the parts that do not need
the kernels, at sizes that fit there; "parallel" in CPU time. `--interpret` runs tiny sizes on CPU:
it tests the suite's own logic, and its times are meaningless.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from absl import app, flags

from benchmarks.gpu_suite import bandwidth, demo, numerics, parallel, tune
from benchmarks.gpu_suite.checks import checks
from benchmarks.gpu_suite.inputs import FULL, SMALL, TINY, Sizes
from benchmarks.gpu_suite.programs import said
from benchmarks.gpu_suite.report import markdown
from fairkv_jax.command_line import with_underscores
from fairkv_jax.pallas.ragged_decode import Device, device_of

Part = Callable[[Sizes, Device], Iterator[dict[str, Any]]]
PARTS: dict[str, tuple[Part, int]] = {
    "serve": (demo.serve, 60),
    "numerics": (numerics.measure, 50),
    "bandwidth": (bandwidth.measure, 130),
    "parallel": (parallel.measure, 150),
    "demo": (demo.generate, 60),
    "tune": (tune.measure, 240),
}
"""Each with the seconds after which it begins nothing new on a GPU; tuning is a run of its own.

They run in this order: the server is a process of its own, and needs the memory that this one
will have taken after the other parts.
"""
ON_CPU = ("serve", "parallel", "demo")
CPU_SECONDS = 450

_OUTPUT = flags.DEFINE_string("output", "benchmarks/results", "Folder of the results.")
_INTERPRET = flags.DEFINE_bool("interpret", False, "Tiny sizes on CPU: tests the suite alone.")
_CPU = flags.DEFINE_bool("cpu", False, f"Measure on a CPU, the parts {', '.join(ON_CPU)}.")
_PARTS = flags.DEFINE_multi_enum(
    "parts", None, list(PARTS), "What is run; default: all but tune that the device can."
)
_PROFILES = flags.DEFINE_string(
    "profiles",
    os.environ.get("FAIRKV_HEAD_PROFILES"),
    "Folder of published profiles, MODEL__SCORER.npz with kept [prompts, L, K], for the part "
    "parallel; default: that in FAIRKV_HEAD_PROFILES. A model without one has a synthetic profile.",
)
_CHECKPOINT_PARTS = flags.DEFINE_string(
    "checkpoint_parts",
    None,
    "Folder from whose files the demo model is joined if it is not there, as by `python -m "
    "fairkv_jax.checkpoint fetch --parts`.",
)
_SECONDS = flags.DEFINE_integer(
    "seconds",
    None,
    "Seconds after which each part begins nothing new; default: its share of 8 minutes, or "
    f"{CPU_SECONDS} with --cpu.",
    lower_bound=1,
)


def main(_argv: list[str]) -> None:
    can = ON_CPU if _CPU.value else PARTS
    wanted = _PARTS.value or [part for part in can if part != "tune"]
    parts = [part for part in PARTS if part in wanted]
    if cannot := [part for part in parts if part not in can]:
        raise app.UsageError(f"--cpu does not measure {', '.join(cannot)}: leave them out")
    if _CPU.value:
        jax.config.update("jax_platforms", "cpu")
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the server needs memory too
    device = device_of()
    if device.platform == "cpu" and not _INTERPRET.value and not _CPU.value:
        print(
            "no GPU: JAX sees only CPUs here, and nothing was measured (--cpu measures on a CPU)",
            file=sys.stderr,
        )
        sys.exit(2)
    if _CHECKPOINT_PARTS.value:
        from fairkv_jax.checkpoint.fetch import fetch_demo

        fetch_demo(parts=Path(_CHECKPOINT_PARTS.value))
    sizes = SMALL if _CPU.value else TINY if _INTERPRET.value else FULL
    sizes = replace(sizes, profiles=Path(_PROFILES.value) if _PROFILES.value else None)
    folder = Path(_OUTPUT.value) / device.kind.lower().replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"about": about(device, sizes), "checks": []}
    for part in parts:
        seconds = _SECONDS.value or (CPU_SECONDS if _CPU.value else PARTS[part][1])
        for _ in run(part, sizes, device, results, seconds):
            results["checks"] = checks(results)
            (folder / "gpu_suite.json").write_text(json.dumps(results, indent=1) + "\n")
            (folder / "gpu_suite.md").write_text(markdown(results))
    if "tune" in parts:
        versions = f"jax {jax.__version__}, {results['about']['commit']}"
        tiles = tune.best_tiles(results["tune"], device, versions)
        (folder / "tiles.json").write_text(json.dumps(tiles, indent=1) + "\n")
    print(markdown(results))
    sys.exit(0 if passed(results) else 1)


def run(
    part: str, sizes: Sizes, device: Device, results: dict[str, Any], seconds: float
) -> Iterator[None]:
    """Puts a part's records into the results; yields whenever there is something to write.

    After the given seconds, the part ends at its next record.
    """
    measure, _ = PARTS[part]
    start = time.perf_counter()
    results[part] = []
    try:
        for record in measure(sizes, device):
            results[part].append(record)
            yield
            if time.perf_counter() - start > seconds:
                results["about"][f"{part}_ended"] = f"after {seconds} s, before all was measured"
                break
    except Exception as error:  # what the other parts measure is worth keeping
        results[part].append({"failed": said(error)})
    results["about"][f"{part}_seconds"] = round(time.perf_counter() - start, 1)
    if sizes.on_cpu:
        results["about"]["load_after"] = round(os.getloadavg()[0], 1)
    yield


def about(device: Device, sizes: Sizes) -> dict[str, Any]:
    """What the figures belong to."""
    command = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    found: dict[str, Any] = {
        "device": device.kind,
        "interpreted": sizes.interpret,
        "jax": jax.__version__,
        "platform": str(jax.devices()[0].client.platform_version).splitlines()[0],
        "commit": commit or "unknown",
    }
    if sizes.on_cpu:
        found["times"] = "CPU time of the process; ratios of the wall clock stand apart"
        found["cpus"] = os.cpu_count()
        found["xla_flags"] = os.environ.get("XLA_FLAGS", "")
        found["load_before"] = round(os.getloadavg()[0], 1)
    return found


def passed(results: dict[str, Any]) -> bool:
    """Whether every part ran, and every backend that ran gave the right numbers.

    A peer, or a tile that was tried, may fail.
    """
    failed = [
        record
        for part in ("serve", "numerics", "parallel", "demo")
        for record in results.get(part, [])
        if "failed" in record
    ]
    wrong = [record for record in results.get("numerics", []) if not record.get("passed", True)]
    empty = [part for part in PARTS if part in results and not results[part]]
    return not failed and not wrong and not empty


if __name__ == "__main__":
    app.run(main, [with_underscores(argument) for argument in sys.argv])
