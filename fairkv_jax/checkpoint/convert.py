"""Converts any checkpoint to Orbax, in head order.

The target appears only when the conversion has finished:

source --> checkpoints/.NAME.partial: params/, tokenizer, profile, model.json --rename--> NAME
"""

import dataclasses
import fcntl
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from fairkv_jax.checkpoint.base import (
    HEAD_SCORES_FILE,
    PROFILE_FILE,
    Checkpoint,
    CheckpointError,
    check_finite,
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

_SYSTEM_REASON = re.compile(r"([^:]+) \[os_error_code=")
"""How tensorstore's messages quote an error of the system."""
CHUNK_BYTES = 2 << 20
"""The approximate size of a chunk of the MLP or the vocabulary; each head is its own chunk."""


def convert(checkpoint: Checkpoint, target: Path, dtype: str | None = None) -> Path:
    """Writes `checkpoint` to the folder `target`, which must not exist, and returns it.

    `dtype` is one of `DTYPES`; None keeps each tensor's own type, float32 for quantized tensors.
    The host holds all tensors at once; those of a Hugging Face folder are memory-mapped.

    Raises:
        CheckpointError: the target exists, another process is converting to it, the disk is full,
            or the source is damaged.
    """
    if dtype not in (None, *DTYPES):
        raise CheckpointError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if target.exists():
        raise CheckpointError(f"{target} exists already: remove it, or choose another name")
    partial = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target), _without_tracebacks():
            shutil.rmtree(partial, ignore_errors=True)  # left by an interrupted conversion
            partial.mkdir()
            try:
                tensors = _write_params(checkpoint, partial / PARAMS, dtype)
                _write_record(checkpoint, partial, tensors)
                os.replace(partial, target)
            except BaseException:
                _remove_for_good(partial)
                raise
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error.strerror or error}") from error
    return target


def _remove_for_good(folder: Path) -> None:
    """Removes a folder in which tensorstore may create files for a moment after a failure."""
    for _ in range(10):
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.1)
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Keeps other conversions to the same target away; the system releases the lock at the end.

    Raises:
        CheckpointError: another process converts to it already.
    """
    path = target.with_name(f".{target.name}.lock")
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"another process is converting to {target}: wait for it, or choose another name"
            ) from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _write_params(checkpoint: Checkpoint, folder: Path, dtype: str | None) -> dict[str, Any]:
    """Saves the tree of all tensors; returns the record of each, with checksums of its chunks."""
    tensors = {name: _values(checkpoint, name, dtype) for name in checkpoint.names()}
    blocks = {name: chunk_rows(value) for name, value in tensors.items()}
    _check_disk(sum(value.nbytes for value in tensors.values()), folder)
    tree = {n: value.reshape(stored_shape(value.shape, blocks[n])) for n, value in tensors.items()}
    # Orbax splits only the leading axis, into pieces of size one.
    save_args = {n: ocp.SaveArgs(shard_axes=(0,)[: value.ndim - 1]) for n, value in tree.items()}
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_compression=False)
    with ocp.Checkpointer(handler) as checkpointer:
        args = ocp.args.PyTreeSave(tree, save_args=save_args)
        try:
            checkpointer.save(folder.resolve(), args=args)
        except OSError:
            raise
        except Exception as error:  # tensorstore raises ValueError, with the system's reason in it
            reason = _SYSTEM_REASON.search(str(error))
            raise OSError(
                reason[1].strip() if reason else str(error).splitlines()[0][:200]
            ) from error
    return {name: _record(value, blocks[name]) for name, value in tensors.items()}


def _check_disk(num_bytes: int, folder: Path) -> None:
    free = shutil.disk_usage(folder.parent).free
    if num_bytes > free:
        raise OSError(
            f"the tensors take {num_bytes / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB are free on "
            "the disk: free some, or choose another folder"
        )


@contextmanager
def _without_tracebacks() -> Iterator[None]:
    """Keeps Orbax and tensorstore from printing errors that are also raised.

    Orbax's thread prints the traceback of a failed write. tensorstore then calls back for all other
    tensors, at any time, and prints one for each, because Orbax has closed its event loop.
    """
    hook, hook_of_threads = sys.unraisablehook, threading.excepthook
    logger = logging.getLogger("absl")  # Orbax's
    level = logger.level

    def drop_late_callbacks(unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook, threading.excepthook = drop_late_callbacks, lambda args: None
    logger.setLevel(logging.CRITICAL)
    try:
        yield
        sys.unraisablehook = hook
    finally:
        logger.setLevel(level)
        threading.excepthook = hook_of_threads


def _values(checkpoint: Checkpoint, name: str, dtype: str | None) -> np.ndarray:
    tensor = checkpoint.lazy(name)
    values = check_finite(tensor.read(0, tensor.shape[0]), checkpoint, name)
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
