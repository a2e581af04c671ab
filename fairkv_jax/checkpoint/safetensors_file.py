"""The safetensors container: a JSON table of tensors followed by their bytes.

A model is stored in one file, or in several with an index.

Format: https://github.com/huggingface/safetensors#format.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from fairkv_jax.checkpoint.base import CheckpointError
from fairkv_jax.checkpoint.files import MappedFile, parse_object, read_object

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES: dict[str, type] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation


@dataclass(frozen=True)
class TensorInfo:
    """The position of one tensor; `offset` counts from the start of the file."""

    kind: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class SafetensorsFile:
    """One mapped file, with `tensors` by name and `read` for their values.

    Raises:
        CheckpointError: the file is missing, damaged or truncated, or holds an unsupported type.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = MappedFile(path)
        data = self._file.data
        size = int.from_bytes(data[:8], "little")
        if size > min(len(data) - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{path} is not a safetensors file, or is truncated: its header would take {size} "
                f"of {len(data)} bytes: copy or fetch it again"
            )
        header = parse_object(data[8 : 8 + size], path)
        header.pop("__metadata__", None)
        self.tensors = {name: self._info(name, entry, 8 + size) for name, entry in header.items()}

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """A read-only view of the rows [start, stop) of one tensor, in its own type."""
        info = self.tensors[name]
        row_bytes = info.num_bytes // info.shape[0]
        raw = self._file.view(info.offset + start * row_bytes, (stop - start) * row_bytes)
        # The format does not guarantee alignment; NumPy can read unaligned views.
        return raw.view(DTYPES[info.kind]).reshape(stop - start, *info.shape[1:])

    def _info(self, name: str, entry: Any, start: int) -> TensorInfo:
        try:
            kind, shape = entry["dtype"], tuple(entry["shape"])
            begin, end = entry["data_offsets"]
            intact = all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end))
        except (TypeError, KeyError, ValueError) as error:
            raise CheckpointError(f"{self.path}: the entry of {name!r} is damaged") from error
        if not isinstance(kind, str) or kind not in DTYPES:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} is stored as {kind}, supported are "
                f"{', '.join(DTYPES)}: take a checkpoint in one of these"
            )
        if not intact or end - begin != math.prod(shape) * np.dtype(DTYPES[kind]).itemsize:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} of shape {shape} and type {kind} does not take "
                f"the bytes {begin} to {end}: the file is damaged"
            )
        if start + end > len(self._file.data):
            raise CheckpointError(
                f"{self.path} is truncated: tensor {name!r} ends at byte {start + end}, the file "
                f"at {len(self._file.data)}: copy or fetch it again"
            )
        return TensorInfo(kind, shape, start + begin, end - begin)


def open_safetensors(folder: Path) -> dict[str, SafetensorsFile]:
    """The file that holds each tensor of a model folder, by the tensor's name.

    Raises:
        CheckpointError: there is no model, a part is missing, or a part lacks an indexed tensor.
    """
    index = folder / INDEX
    if not index.exists():
        single = SafetensorsFile(folder / SINGLE)
        return dict.fromkeys(single.tensors, single)
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(part, str) for part in weight_map.values()
    ):
        raise CheckpointError(f"{index} has no weight_map of file names: fetch it again")
    parts = {name: SafetensorsFile(folder / Path(name).name) for name in set(weight_map.values())}
    for name, part in weight_map.items():
        if name not in parts[part].tensors:
            raise CheckpointError(
                f"{folder / part} lacks the tensor {name!r} that {INDEX} announces: "
                "fetch both again"
            )
    return {name: parts[part] for name, part in weight_map.items()}
