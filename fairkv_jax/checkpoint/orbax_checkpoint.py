"""A converted checkpoint: parameters in head order in an Orbax tree, tokenizer and profile.

    checkpoints/NAME/
      model.json             name, configuration, and checksums of everything below; written last
      params/                written by Orbax: an OCDBT store of zarr arrays, one per tensor, in
                             chunks of one KV head or of some rows: [rows, D] is stored as
                             [chunks, rows / chunks, D]
      tokenizer.json, tokenizer_config.json, generation_config.json
      profile.json           if the source had one

It can be loaded on any mesh with any plan: every process reads the chunks of its devices' heads.
"""

import hashlib
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore as ts

from fairkv_jax.checkpoint.base import (
    CheckpointError,
    LazyTensor,
    Stored,
    check_tokenizer,
    read_head_scores,
    read_profile,
)
from fairkv_jax.checkpoint.files import Buffers, read_object
from fairkv_jax.checkpoint.hf_tokenizer import build_tokenizer
from fairkv_jax.config import ModelConfig
from fairkv_jax.models import param_specs
from fairkv_jax.plan import HeadScores, Profile
from fairkv_jax.tokenizer import Tokenizer

MODEL_FILE = "model.json"
PARAMS = "params"
FORMAT = 1
DTYPES: dict[str, type] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}
_EARLIER_NAMES = {"lm_head": "unembed"}
"""Names of tensors in checkpoints that were converted by earlier versions."""
_NODE_CACHE_BYTES = 16 << 20


@dataclass(frozen=True)
class TensorRecord:
    """A tensor's entry in model.json: its type, and the checksums of blocks of its rows."""

    dtype: str
    block: int
    crc32: list[int]


class OrbaxCheckpoint:
    """A converted model; the checksum of every block of rows is checked when it is read.

    Raises:
        CheckpointError: the folder holds no finished conversion, or model.json is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        record = read_record(folder)
        try:
            self.name = str(record["name"])
            self.config = _config(record["config"])
            self._records = {n: TensorRecord(**r) for n, r in record["tensors"].items()}
            self._files: dict[str, str] = dict(record["files"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{folder / MODEL_FILE} is damaged: {error}") from error
        self._shapes = {name: spec.shape for name, spec in param_specs(self.config).items()}
        self._stored_names = {name: self._stored_name(name) for name in self._shapes}
        if self._records.keys() != set(self._stored_names.values()):
            raise CheckpointError(
                f"{folder / MODEL_FILE} lists other tensors than its configuration requires: "
                "convert the model again"
            )
        self._buffers = Buffers()
        self._context = ts.Context({"cache_pool#nodes": {"total_bytes_limit": _NODE_CACHE_BYTES}})

    @property
    def profile(self) -> Profile | None:
        self._check_files()
        return read_profile(self._folder)

    @property
    def head_scores(self) -> HeadScores | None:
        self._check_files()
        return read_head_scores(self._folder)

    def names(self) -> tuple[str, ...]:
        return tuple(self._shapes)

    def lazy(self, name: str) -> LazyTensor:
        if name not in self._shapes:
            raise CheckpointError(f"{self._folder} has no tensor {name!r}: see names()")
        record, shape = self._record(name), self._shapes[name]
        store = self._guarded(name, lambda: ts.open(self._spec(name), context=self._context))
        if store.shape != stored_shape(shape, record.block) or store.dtype.name != record.dtype:
            raise CheckpointError(
                f"{self._folder}: tensor {name!r} is {store.dtype.name} {store.shape}, "
                f"but {MODEL_FILE} says {record.dtype} {shape}: the two do not belong together"
            )
        return LazyTensor(shape, record.block, partial(self._read, name, store, record.block))

    def tensor(self, name: str) -> np.ndarray:
        return self.lazy(name).whole()

    def stored(self, name: str) -> Stored:
        dtype = self._record(name).dtype
        size = int(np.prod(self._shapes[name]))
        return Stored(dtype, size * np.dtype(DTYPES[dtype]).itemsize)

    def tokenizer(self) -> Tokenizer:
        self._check_files()
        return check_tokenizer(build_tokenizer(self._folder), self.config, self._folder)

    def _stored_name(self, name: str) -> str:
        earlier = _EARLIER_NAMES.get(name, name)
        return earlier if earlier in self._records else name

    def _record(self, name: str) -> TensorRecord:
        return self._records[self._stored_names[name]]

    def _spec(self, name: str) -> dict[str, Any]:
        base = f"file://{(self._folder / PARAMS).resolve()}/"
        nodes = {"driver": "ocdbt", "base": base, "cache_pool": "cache_pool#nodes"}
        return {"driver": "zarr", "kvstore": nodes, "path": self._stored_names[name], "open": True}

    def _read(self, name: str, store: Any, block: int, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop), from whole chunks whose checksums have been checked."""
        shape, checksums = self._shapes[name], self._record(name).crc32
        first, last = start // block, -(-stop // block)
        chunks = store if block == shape[0] else store[first:last]
        rows = self._buffers.array(chunks.shape, np.dtype(DTYPES[self._record(name).dtype]))
        self._guarded(name, lambda: ts.array(rows).write(chunks))
        rows = rows.reshape(-1, *shape[1:])
        for chunk in range(first, last):
            at = (chunk - first) * block
            if block_checksum(rows[at : at + block]) != checksums[chunk]:
                raise CheckpointError(
                    f"{self._folder}: tensor {name!r} is damaged in the rows from {chunk * block} "
                    "on (its checksum differs): copy the checkpoint or convert the model again"
                )
        return rows[start - first * block : stop - first * block]

    def _guarded(self, name: str, start: Callable[[], Any]) -> Any:
        """The result of a tensorstore operation; its errors become errors that name the tensor."""
        try:
            return start().result()
        except Exception as error:  # the package raises ValueError, OSError and others
            raise CheckpointError(
                f"{self._folder}: tensor {name!r} is damaged or missing: {error}: copy the "
                "checkpoint or convert the model again"
            ) from error

    def _check_files(self) -> None:
        for name, expected in self._files.items():
            try:
                actual = hashlib.sha256((self._folder / name).read_bytes()).hexdigest()
            except OSError as error:
                raise CheckpointError(f"{self._folder} lacks {name}: {error}") from error
            if actual != expected:
                raise CheckpointError(
                    f"{self._folder / name} is damaged (its checksum differs): copy the checkpoint "
                    "or convert the model again"
                )


def stored_shape(shape: tuple[int, ...], block: int) -> tuple[int, ...]:
    """The shape in the store: several rows per chunk get a leading axis of chunks."""
    if block in (1, shape[0]):
        return shape
    return (shape[0] // block, block, *shape[1:])


def block_checksum(rows: np.ndarray) -> int:
    """The CRC-32 of an array's bytes in row order."""
    raw: Any = np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
    return zlib.crc32(raw)


def record_checksum(record: dict[str, Any]) -> str:
    """The SHA-256 of everything in model.json except the checksum itself."""
    rest = {key: value for key, value in record.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_record(folder: Path) -> dict[str, Any]:
    """The content of model.json, which exists only after a conversion has finished."""
    path = folder / MODEL_FILE
    record = read_object(path)
    if record.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has the format {record.get('format')!r}, supported is {FORMAT}: convert again"
        )
    if record.get("sha256") != record_checksum(record):
        raise CheckpointError(
            f"{path} is damaged (its checksum differs): copy the checkpoint or convert it again"
        )
    return record


def _config(values: dict[str, Any]) -> ModelConfig:
    divisors = values["rope_divisors"]
    known: dict[str, Any] = values | {"rope_divisors": divisors and tuple(divisors)}
    return ModelConfig(**known)
