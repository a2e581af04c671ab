"""Measures the speed and host memory of loading checkpoints, compared with reading their files.

    python -m benchmarks.load --output benchmarks/results/load

The command writes a synthetic model with random weights in safetensors and converts it to Orbax.
Then it alternates reading the files into memory with loading each checkpoint onto CPU devices, both
with the files in the system's page cache and without.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags

from fairkv_jax.command_line import with_underscores

_GIGABYTES = flags.DEFINE_float("gigabytes", 2.0, "Approximate size of the weights in 10^9 bytes.")
_DEVICES = flags.DEFINE_integer("devices", 2, "CPU devices that share the model.")
_REPEATS = flags.DEFINE_integer("repeats", 7, "Number of timed runs; the median is reported.")
_FOLDER = flags.DEFINE_string("folder", None, "Folder of the files; default: a temporary one.")
_OUTPUT = flags.DEFINE_string("output", None, "Path of the results, without .json and .md.")
_MEASURE = flags.DEFINE_string(
    "measure_memory", None, "Path of a checkpoint: only load it and print the memory used."
)

_LAYER_BYTES = 2 * (2 * 2048 * (2048 + 256) + 3 * 2048 * 5632)
_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "eos_token_id": 0,
}
"""The sizes of TinyLlama; the number of layers follows from --gigabytes."""


def write_synthetic(folder: Path, num_bytes: float) -> Path:
    """Writes a Hugging Face checkpoint with random bfloat16 weights of about that size."""
    import ml_dtypes
    import numpy as np
    from tokenizers import Tokenizer, models

    from fairkv_jax.checkpoint.hf_checkpoint import read_config
    from fairkv_jax.models import param_specs

    folder.mkdir(parents=True)
    layers = max(1, round((num_bytes - 4 * 32000 * 2048) / _LAYER_BYTES))
    (folder / "config.json").write_text(json.dumps(_CONFIG | {"num_hidden_layers": layers}))
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(folder / "tokenizer.json"))
    header, end = {}, 0
    for spec in param_specs(read_config(folder)).values():
        size = 2 * int(np.prod(spec.shape))
        entry = {"dtype": "BF16", "shape": spec.stored_shape}
        header[spec.hf_name] = entry | {"data_offsets": [end, end + size]}
        end += size
    head = json.dumps(header).encode()
    values = np.random.default_rng(0).standard_normal(1 << 24, np.float32) * np.float32(0.02)
    piece = values.astype(ml_dtypes.bfloat16).tobytes()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for start in range(0, end, len(piece)):
            file.write(piece[: end - start])
    return folder


def loader(path: Path) -> Callable[[], Any]:
    """Returns a function that loads a checkpoint onto all CPU devices."""
    from fairkv_jax.checkpoint import open_checkpoint
    from fairkv_jax.plan import Profile, make_plan
    from fairkv_jax.sharding.load_weights import load_model
    from fairkv_jax.sharding.mesh import make_mesh
    from fairkv_jax.sharding.slots import SlotLayout

    config = open_checkpoint(path).config
    profile = Profile.uniform(config.num_layers, config.num_kv_heads, 1024)
    layout = SlotLayout.from_plan(make_plan(profile, _DEVICES.value, "static"))
    mesh = make_mesh(_DEVICES.value)
    return lambda: load_model(open_checkpoint(path), layout, mesh, "bfloat16", progress=False)


def weight_files(path: Path) -> list[Path]:
    files = [file for file in path.rglob("*") if file.is_file() and file.suffix != ".json"]
    return [file for file in files if file.stat().st_size > 1 << 16]


def evict(files: list[Path]) -> None:
    """Evicts files from the page cache."""
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timings(folders: dict[str, Path]) -> dict[str, dict[str, float]]:
    """Returns the median milliseconds of reading and loading, with and without the page cache."""
    from benchmarks.timing import median_ms

    runs: dict[str, Callable[[], Any]] = {}
    files = {name: weight_files(folder) for name, folder in folders.items()}
    for name, folder in folders.items():
        runs[f"read {name}"] = lambda name=name: [file.read_bytes() for file in files[name]]
        runs[f"load {name}"] = loader(folder)
    everything = [file for each in files.values() for file in each]
    return {
        "cached": median_ms(runs, _REPEATS.value),
        "dropped": median_ms(runs, _REPEATS.value, before=lambda: evict(everything)),
    }


def memory(path: Path) -> dict[str, int]:
    """Measures, in a separate process, the host memory that loading uses besides the weights."""
    command = [sys.executable, "-m", "benchmarks.load", f"--measure_memory={path}"]
    command.append(f"--devices={_DEVICES.value}")
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def measure_memory(path: Path) -> dict[str, int]:
    import jax

    load = loader(path)
    jax.block_until_ready(jax.numpy.zeros(1))
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    before = pages * os.sysconf("SC_PAGE_SIZE")
    model = load()
    # `ru_maxrss` is not used, because a process inherits it from its parent.
    status = Path("/proc/self/status").read_text()
    max_resident = 1024 * int(status.partition("VmHWM:")[2].split()[0])
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    return {"held_by_devices": held, "peak_beyond_it": max_resident - before - held}


def table(results: dict[str, Any]) -> str:
    """Formats the results as Markdown."""
    gigabytes = results["bytes"] / 1e9
    lines = [
        "# Loading a checkpoint",
        "",
        f"`python -m benchmarks.load`: {gigabytes:.2f} GB of random bfloat16 weights, "
        f"{results['flags']['devices']} CPU devices, {results['cpus']} cores at a load average of "
        f"{results['load_average']:.1f} at the start, median of {results['flags']['repeats']} "
        "runs. The last column compares with reading the same files into memory in one thread.",
        "",
        "| page cache | format | read, GB/s | load, GB/s | speed relative to reading |",
        "|---|---|---|---|---|",
    ]
    for state, ms in results["ms"].items():
        for name in results["memory"]:
            read, load = ms[f"read {name}"], ms[f"load {name}"]
            speeds = f"{1e3 * gigabytes / read:.2f} | {1e3 * gigabytes / load:.2f}"
            lines.append(f"| {state} | {name} | {speeds} | {read / load:.2f} |")
    lines += ["", "| format | host memory besides the weights | largest tensor + 1 GiB |"]
    lines.append("|---|---|---|")
    limit = results["largest_tensor"] + (1 << 30)
    for name, figures in results["memory"].items():
        lines.append(
            f"| {name} | {figures['peak_beyond_it'] / 2**20:.0f} MiB | {limit >> 20} MiB |"
        )
    return "\n".join(lines) + "\n"


def run(folder: Path) -> dict[str, Any]:
    from fairkv_jax.checkpoint import open_checkpoint
    from fairkv_jax.checkpoint.convert import convert

    folders = {"safetensors": folder / "synthetic", "Orbax": folder / "converted"}
    if not folders["safetensors"].exists():
        write_synthetic(folders["safetensors"], 1e9 * _GIGABYTES.value)
    checkpoint = open_checkpoint(folders["safetensors"])
    if not folders["Orbax"].exists():
        convert(checkpoint, folders["Orbax"])
    sizes = [checkpoint.stored(name).num_bytes for name in checkpoint.names()]
    return {
        "flags": {name: flags.FLAGS[name].value for name in ("gigabytes", "devices", "repeats")},
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "bytes": sum(sizes),
        "largest_tensor": max(sizes),
        "memory": {name: memory(path) for name, path in folders.items()},
        "ms": timings(folders),
    }


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    device_count = f"--xla_force_host_platform_device_count={_DEVICES.value}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {device_count}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    if _MEASURE.value:
        print(json.dumps(measure_memory(Path(_MEASURE.value))))
        return
    folder = Path(_FOLDER.value or tempfile.mkdtemp(prefix="fairkv_jax_load_"))
    try:
        results = run(folder)
    finally:
        if not _FOLDER.value:
            shutil.rmtree(folder)
    print(table(results))
    if _OUTPUT.value:
        Path(f"{_OUTPUT.value}.json").write_text(json.dumps(results, indent=2) + "\n")
        Path(f"{_OUTPUT.value}.md").write_text(table(results))


if __name__ == "__main__":
    app.run(main, argv=[with_underscores(argument) for argument in sys.argv])
