"""`python -m fairkv_jax.checkpoint`: fetch the demo checkpoint, or show what a checkpoint holds."""

import argparse
import dataclasses
import logging
import math
import sys
from pathlib import Path

from fairkv_jax.checkpoint.base import Checkpoint, CheckpointError
from fairkv_jax.checkpoint.fetch import DEMO_MODEL, checkpoints_root, fetch_demo
from fairkv_jax.checkpoint.layout import tensor_shapes
from fairkv_jax.checkpoint.open import open_checkpoint


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; an error is one line on stderr and the exit status 1."""
    parser = argparse.ArgumentParser(prog="python -m fairkv_jax.checkpoint", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    fetch = commands.add_parser("fetch", help=f"fetch {DEMO_MODEL} and print where it lies")
    fetch.add_argument(
        "--root", type=Path, default=checkpoints_root(), help="where to keep it (%(default)s)"
    )
    inspect = commands.add_parser("inspect", help="print configuration, tensors, bytes, parameters")
    inspect.add_argument("path", help="a GGUF file, a folder with one, or a name in checkpoints/")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if options.command == "fetch":
            print(fetch_demo(options.root))
        else:
            print(describe(open_checkpoint(options.path)))
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def describe(checkpoint: Checkpoint) -> str:
    """The configuration, one line a tensor in head order, and the sums."""
    config = dataclasses.asdict(checkpoint.config)
    lines = [checkpoint.name, *(f"  {key:24} {value}" for key, value in config.items()), ""]
    shapes = tensor_shapes(checkpoint.config)
    stored = {name: checkpoint.stored(name) for name in checkpoint.names()}
    lines.append(f"  {'tensor':24} {'shape':20} {'stored':6} {'bytes':>12}")
    for name, (kind, num_bytes) in stored.items():
        shape = " × ".join(map(str, shapes[name]))
        lines.append(f"  {name:24} {shape:20} {kind:6} {num_bytes:12,}")
    parameters = sum(math.prod(shapes[name]) for name in stored)
    total_bytes = sum(num_bytes for _, num_bytes in stored.values())
    lines += ["", f"{len(stored)} tensors, {parameters:,} parameters, {total_bytes:,} bytes"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
