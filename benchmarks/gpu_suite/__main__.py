"""What the kernels and the plans do on this GPU, in one command of under 8 minutes.

    python -m benchmarks.gpu_suite --output benchmarks/results

Writes <output>/<device>/gpu_suite.json and .md after every part, so that a run that is cut short
keeps what it measured. Ends with 1 where a backend computes wrong numbers or a part fails, and
with 2 where there is no GPU. `--interpret` runs tiny sizes on CPU: it tests the suite's own logic,
and its times mean nothing.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import app, flags

from benchmarks.gpu_suite import bandwidth, demo, numerics, parallel
from benchmarks.gpu_suite.inputs import FULL, TINY
from benchmarks.gpu_suite.report import markdown
from fairkv_jax.command_line import with_underscores
from fairkv_jax.pallas.ragged_decode import Device, device_of

_OUTPUT = flags.DEFINE_string("output", None, "Folder of the results.", required=True)
_INTERPRET = flags.DEFINE_bool("interpret", False, "Tiny sizes on CPU: tests the suite alone.")
_PARTS = flags.DEFINE_list("parts", ["numerics", "bandwidth", "parallel", "demo"], "What is run.")


def main(_argv: list[str]) -> None:
    device = device_of()
    if device.platform == "cpu" and not _INTERPRET.value:
        print("no GPU: JAX sees only CPUs here, and nothing was measured", file=sys.stderr)
        sys.exit(2)
    sizes = TINY if _INTERPRET.value else FULL
    parts: dict[str, Callable[[], Any]] = {
        "numerics": lambda: numerics.measure(sizes, device),
        "bandwidth": lambda: bandwidth.measure(sizes, device),
        "parallel": lambda: parallel.measure(sizes, device),
        "demo": lambda: demo.measure(sizes),
    }
    folder = Path(_OUTPUT.value) / device.kind.lower().replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"about": about(device, sizes.interpret)}
    for part in _PARTS.value:
        start = time.perf_counter()
        try:
            results[part] = parts[part]()
        except Exception as error:  # what the other parts measured is worth keeping
            results[part] = {"failed": f"{type(error).__name__}: {error}"}
        results["about"][f"{part}_seconds"] = round(time.perf_counter() - start, 1)
        (folder / "gpu_suite.json").write_text(json.dumps(results, indent=1) + "\n")
        (folder / "gpu_suite.md").write_text(markdown(results))
    print(markdown(results))
    sys.exit(0 if passed(results) else 1)


def about(device: Device, interpret: bool) -> dict[str, Any]:
    """What the figures belong to."""
    command = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": device.kind,
        "interpreted": interpret,
        "jax": jax.__version__,
        "platform": str(jax.devices()[0].client.platform_version).splitlines()[0],
        "commit": commit or "unknown",
    }


def passed(results: dict[str, Any]) -> bool:
    """Whether every part ran, and every backend that ran gave the right numbers."""
    failed = [part for part in results.values() if isinstance(part, dict) and "failed" in part]
    wrong = [
        record
        for record in results.get("numerics", [])
        if isinstance(record, dict) and not record.get("passed", "skipped" in record)
    ]
    return not failed and not wrong


if __name__ == "__main__":
    app.run(main, [with_underscores(argument) for argument in sys.argv])
