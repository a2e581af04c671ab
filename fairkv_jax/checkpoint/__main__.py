"""`python -m fairkv_jax.checkpoint`: fetch a checkpoint, convert it, or show its contents."""

import argparse
import dataclasses
import faulthandler
import logging
import math
import sys
from pathlib import Path

import numpy as np

from fairkv_jax.checkpoint.base import Checkpoint, CheckpointError
from fairkv_jax.checkpoint.convert import convert
from fairkv_jax.checkpoint.fetch import DEMO_MODEL, checkpoints_root, fetch_demo
from fairkv_jax.checkpoint.hashes import verify
from fairkv_jax.checkpoint.hub import fetch_hub, is_hub_name
from fairkv_jax.checkpoint.open import open_checkpoint
from fairkv_jax.checkpoint.orbax_checkpoint import DTYPES
from fairkv_jax.config import KV_CACHE_DTYPES, QUANTIZATIONS, page_dtype
from fairkv_jax.kv_cache_spec import token_bytes
from fairkv_jax.models import param_specs
from fairkv_jax.models.params import device_bytes
from fairkv_jax.plan import STRATEGIES, ModelShape, Profile, default_cost, make_plan


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; errors are printed in one line to stderr, with exit status 1."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if options.command == "fetch":
            path = _fetch(options)
            if options.verify:
                print(f"{verify(path)} files have their recorded hashes", file=sys.stderr)
            print(path)
        elif options.command == "convert":
            print(convert(open_checkpoint(options.source), options.target, options.dtype))
        else:
            print(_inspect(options))
    except ValueError as error:  # CheckpointError, and errors of the planner
        print(f"error: {error}", file=sys.stderr)
        return 1
    except MemoryError:
        print("error: the process may not take more memory: raise its limit", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fairkv_jax.checkpoint", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    fetch = commands.add_parser("fetch", help="fetch a model and print its path")
    fetch.add_argument(
        "name",
        nargs="?",
        default=DEMO_MODEL,
        help="%(default)s (default), or OWNER/MODEL on the Hugging Face Hub",
    )
    fetch.add_argument("--revision", help="branch, tag or commit in the Hub's repository")
    fetch.add_argument(
        "--parts",
        type=Path,
        metavar="DIR",
        help=f"join {DEMO_MODEL} from the parts of its file in this folder instead of fetching it; "
        "`split --bytes=60M FILE DIR/FILE.part-` makes them",
    )
    fetch.add_argument(
        "--verify",
        action="store_true",
        help="compare the files, also those fetched earlier, with the hashes recorded then",
    )
    fetch.add_argument(
        "--download-dir",
        "--root",
        type=Path,
        default=checkpoints_root(),
        help="folder for checkpoints (default: checkpoints/ in a source tree, otherwise "
        "~/.cache/fairkv_jax/checkpoints)",
    )
    convert = commands.add_parser("convert", help="convert a checkpoint to Orbax, for any mesh")
    convert.add_argument("source", help="a model as in LLM(model=...)")
    convert.add_argument("target", type=Path, help="folder to create, e.g. checkpoints/NAME")
    convert.add_argument("--dtype", choices=DTYPES, help="type of all weights; default: as stored")
    inspect = commands.add_parser(
        "inspect", help="print configuration, tensors, bytes and parameters"
    )
    inspect.add_argument("path", help="a model as in LLM(model=...)")
    inspect.add_argument(
        "--devices", type=int, help="also print the memory that each of this many devices needs"
    )
    inspect.add_argument("--head-plan", choices=STRATEGIES, default="fair_copying")
    inspect.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="type of the weights on the devices"
    )
    inspect.add_argument(
        "--quantization", choices=QUANTIZATIONS, help="quantization of the weights on the devices"
    )
    inspect.add_argument(
        "--kv-cache-dtype",
        choices=KV_CACHE_DTYPES,
        default="auto",
        help="type of the KV cache on the devices; auto (default): that of --dtype",
    )
    return parser


def _fetch(options: argparse.Namespace) -> Path:
    if options.name == DEMO_MODEL:
        return fetch_demo(options.download_dir, options.parts)
    if not is_hub_name(options.name):
        raise CheckpointError(
            f"{options.name!r} is neither {DEMO_MODEL} nor OWNER/MODEL of the Hugging Face Hub"
        )
    if options.parts is not None:
        raise CheckpointError(f"--parts is for {DEMO_MODEL}, whose hash is known")
    return fetch_hub(options.name, options.download_dir, options.revision)


def _inspect(options: argparse.Namespace) -> str:
    checkpoint = open_checkpoint(options.path)
    text = describe(checkpoint)
    if options.devices is not None:
        text += "\n\n" + _describe_mesh(checkpoint, options)
    return text


def describe(checkpoint: Checkpoint) -> str:
    """The configuration, one line per tensor in head order, and the totals."""
    config = dataclasses.asdict(checkpoint.config)
    if config["rope_divisors"] is not None:
        config["rope_divisors"] = "1 to {:g}".format(max(config["rope_divisors"]))
    lines = [checkpoint.name, *(f"  {key:24} {value}" for key, value in config.items()), ""]
    shapes = {name: spec.shape for name, spec in param_specs(checkpoint.config).items()}
    stored = {name: checkpoint.stored(name) for name in checkpoint.names()}
    lines.append(f"  {'tensor':24} {'shape':20} {'stored':8} {'bytes':>14}")
    for name, (kind, num_bytes) in stored.items():
        shape = " × ".join(map(str, shapes[name]))
        lines.append(f"  {name:24} {shape:20} {kind:8} {num_bytes:14,}")
    parameters = sum(math.prod(shapes[name]) for name in stored)
    total_bytes = sum(num_bytes for _, num_bytes in stored.values())
    lines += ["", f"{len(stored)} tensors, {parameters:,} parameters, {total_bytes:,} bytes"]
    if checkpoint.profile is not None:
        lines.append(f"head profile: {checkpoint.profile.policy}, {checkpoint.profile.source}")
    return "\n".join(lines)


def _describe_mesh(checkpoint: Checkpoint, options: argparse.Namespace) -> str:
    """The weights' bytes on each device, for the checkpoint's profile or a uniform one."""
    config = checkpoint.config
    profile = checkpoint.profile
    if profile is None:
        profile = Profile.uniform(config.num_layers, config.num_kv_heads, 1024)
    # Without the model's shape the planner would take replicated weights to cost nothing.
    profile = dataclasses.replace(profile, shape=ModelShape.from_config(config))
    itemsize = np.dtype(DTYPES[options.dtype]).itemsize
    cost = default_cost(
        profile, options.devices, itemsize=itemsize, kv_cache_dtype=options.kv_cache_dtype
    )
    plan = make_plan(profile, options.devices, options.head_plan, cost=cost)
    needs = device_bytes(
        config, plan.slots, plan.num_devices, itemsize, int8=options.quantization == "int8"
    )
    types = options.quantization or options.dtype
    lines = [f"each of {options.devices} devices, {options.head_plan}, {types}:"]
    lines += [f"  {part:24} {num_bytes:14,} bytes" for part, num_bytes in needs.items()]
    lines.append(f"  {'all weights':24} {sum(needs.values()):14,} bytes")
    cached_type = page_dtype(options.kv_cache_dtype, options.dtype)
    cached = token_bytes(config.head_dim, cached_type) * config.num_layers * config.num_kv_heads
    lines += [
        f"KV cache in {cached_type}, over all devices:",
        f"  {'a token that all keep':24} {cached:14,} bytes",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    faulthandler.enable()  # the weights are mapped files: one that is cut short ends the process
    sys.exit(main())
