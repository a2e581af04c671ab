"""Converts any checkpoint to Orbax, in head order.

The target appears only when the conversion has finished:

source --> checkpoints/.NAME.partial: params/, tokenizer, profile, model.json --rename--> NAME
"""

import dataclasses
import hashlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from fairkv_jax.checkpoint.base import (
    HEAD_SCORES_FILE,
    PROFILE_FILE,
    Checkpoint,
    CheckpointError,
    LazyTensor,
)
from fairkv_jax.checkpoint.orbax_checkpoint import (
    DTYPES,
    FORMAT,
    MODEL_FILE,
    PARAMS,
    block_checksum,
    record_checksum,
    stored_shape,
)

CHUNK_BYTES = 2 << 20
"""The approximate size of a chunk of the MLP or the vocabulary; each head is its own chunk."""


def convert(checkpoint: Checkpoint, target: Path, dtype: str | None = None) -> Path:
    """Writes `checkpoint` to the folder `target`, which must not exist, and returns it.

    `dtype` is one of `DTYPES`; None keeps each tensor's own type, float32 for quantized tensors.
    The host holds all tensors at once; those of a Hugging Face folder are memory-mapped.

    Raises:
        CheckpointError: the target exists, the disk is full, or the source is damaged.
    """
    if dtype not in (None, *DTYPES):
        raise CheckpointError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if target.exists():
        raise CheckpointError(f"{target} exists already: remove it, or choose another name")
    partial = target.with_name(f".{target.name}.partial")
    try:
        if partial.exists():
            shutil.rmtree(partial)  # left by an interrupted conversion
        partial.mkdir(parents=True)
        tensors = _write_params(checkpoint, partial / PARAMS, dtype)
        _write_record(checkpoint, partial, tensors)
        os.replace(partial, target)
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error}") from error
    return target


def _write_params(checkpoint: Checkpoint, folder: Path, dtype: str | None) -> dict[str, Any]:
    """Saves the tree of all tensors; returns the record of each, with checksums of its chunks."""
    tensors = {name: _values(checkpoint.lazy(name), dtype) for name in checkpoint.names()}
    blocks = {name: chunk_rows(value) for name, value in tensors.items()}
    tree = {n: value.reshape(stored_shape(value.shape, blocks[n])) for n, value in tensors.items()}
    # Orbax splits only the leading axis, into pieces of size one.
    save_args = {n: ocp.SaveArgs(shard_axes=(0,)[: value.ndim - 1]) for n, value in tree.items()}
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_compression=False)
    with ocp.Checkpointer(handler) as checkpointer:
        args = ocp.args.PyTreeSave(tree, save_args=save_args)
        checkpointer.save(folder.resolve(), args=args)
    return {name: _record(value, blocks[name]) for name, value in tensors.items()}


def _values(tensor: LazyTensor, dtype: str | None) -> np.ndarray:
    values = tensor.read(0, tensor.shape[0])
    return values if dtype is None else values.astype(DTYPES[dtype])


def chunk_rows(value: np.ndarray) -> int:
    """Rows per chunk: one head, or the divisor of the rows that is closest to `CHUNK_BYTES`."""
    rows = len(value)
    if value.ndim > 2:
        return 1
    target = CHUNK_BYTES * rows / value.nbytes
    divisors = [size for size in range(1, rows + 1) if rows % size == 0]
    return min(divisors, key=lambda size: abs(math.log(size / target)))


def _record(value: np.ndarray, block: int) -> dict[str, Any]:
    starts = range(0, len(value), block)
    checksums = [block_checksum(value[start : start + block]) for start in starts]
    return {"dtype": value.dtype.name, "block": block, "crc32": checksums}


def _write_record(checkpoint: Checkpoint, folder: Path, tensors: dict[str, Any]) -> None:
    checkpoint.tokenizer().save(folder)
    if checkpoint.profile is not None:
        (folder / PROFILE_FILE).write_text(checkpoint.profile.to_json())
    if checkpoint.head_scores is not None:
        (folder / HEAD_SCORES_FILE).write_text(checkpoint.head_scores.to_json())
    files = sorted(path for path in folder.iterdir() if path.is_file())
    record = {
        "format": FORMAT,
        "name": checkpoint.name,
        "config": dataclasses.asdict(checkpoint.config),
        "tensors": tensors,
        "files": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
    }
    record = json.loads(json.dumps(record))  # tuples become lists, as in what is read back
    record["sha256"] = record_checksum(record)
    (folder / MODEL_FILE).write_text(json.dumps(record))
