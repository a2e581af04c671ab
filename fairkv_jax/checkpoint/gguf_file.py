"""The GGUF container: metadata, the table of tensors, and the bytes of one tensor.

`gguf.GGUFReader` makes a NumPy view of every vocabulary entry, which takes seconds. This reader
parses the header in a tenth of a second and checks every length against the file. Dequantization
and the enumerations come from the `gguf` package. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

from fairkv_jax.checkpoint.base import CheckpointError
from fairkv_jax.checkpoint.files import MappedFile

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

FLOATS: dict[GGMLQuantizationType, type] = {
    GGMLQuantizationType.F32: np.float32,
    GGMLQuantizationType.F16: np.float16,
    GGMLQuantizationType.BF16: ml_dtypes.bfloat16,
}
_QUANTISED = tuple(
    GGMLQuantizationType[name] for name in ("Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K")
)
SUPPORTED_TYPES = tuple(kind.name for kind in (*FLOATS, *_QUANTISED))

_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
    GGUFValueType.BOOL: "?",
}


@dataclass(frozen=True)
class TensorInfo:
    """The position of one tensor; `shape` is in NumPy's order, `offset` counts from the start."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class GGUFFile:
    """An open GGUF file, with `metadata` by key, `tensors` by name and `read` for their values.

    Raises:
        CheckpointError: the file is missing, not GGUF or truncated, or holds an unsupported type.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = MappedFile(path)
        header = _Header(path, self._file.data)
        self.metadata = header.metadata
        self.tensors = header.tensors

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start, stop) of one tensor: a view in its own float type, or float32."""
        info = self.tensors[name]
        stop = info.shape[0] if stop is None else stop
        if info.kind not in FLOATS and len(info.shape) == 1:  # blocks may cross entries
            return self._decode(info, info.offset, info.shape)[start:stop]
        row_bytes = info.num_bytes // info.shape[0]
        return self._decode(info, info.offset + start * row_bytes, (stop - start, *info.shape[1:]))

    def _decode(self, info: TensorInfo, offset: int, shape: tuple[int, ...]) -> np.ndarray:
        block, block_bytes = GGML_QUANT_SIZES[info.kind]
        raw = self._file.view(offset, math.prod(shape) // block * block_bytes)
        if info.kind in FLOATS:
            return raw.view(FLOATS[info.kind]).reshape(shape)
        return dequantize(raw.reshape(*shape[:-1], -1), info.kind).reshape(shape)


class _Header:
    """Parses the header with a cursor that never moves past the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._offset = path, data, 0
        if data[:4] != MAGIC:
            raise CheckpointError(
                f"{path} is not a GGUF file: it starts with {data[:4]!r} instead of {MAGIC!r}"
            )
        self._offset = 4
        version = self._scalar("I")
        if version not in VERSIONS:
            raise CheckpointError(
                f"{path} is GGUF version {version}, supported are {VERSIONS} in little-endian "
                "order: convert it again with a current llama.cpp"
            )
        num_tensors, num_entries = self._scalar("Q"), self._scalar("Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(num_entries):
            key = self._string()
            self.metadata[key] = self._value(self._type())
        infos = [self._tensor_info() for _ in range(num_tensors)]
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0:
            raise CheckpointError(f"{path}: general.alignment must be positive, got {alignment!r}")
        start = -(-self._offset // alignment) * alignment
        self.tensors = {info.name: self._placed(info, start) for info in infos}

    def _placed(self, info: TensorInfo, start: int) -> TensorInfo:
        """The tensor with its offset counted from the start of the file; it must lie within it."""
        offset = start + info.offset
        if offset + info.num_bytes > len(self._data):
            raise self._truncated(f"tensor {info.name!r}", offset + info.num_bytes)
        return TensorInfo(info.name, info.kind, info.shape, offset, info.num_bytes)

    def _truncated(self, what: str, end: int) -> CheckpointError:
        return CheckpointError(
            f"{self._path} is truncated: {what} ends at byte {end}, the file at "
            f"{len(self._data)}: copy or fetch it again"
        )

    def _take(self, num_bytes: int) -> int:
        """Advances over the next bytes, which must exist, and returns their offset."""
        start = self._offset
        if start + num_bytes > len(self._data):
            raise self._truncated("its header", start + num_bytes)
        self._offset = start + num_bytes
        return start

    def _scalar(self, code: str) -> Any:
        layout = "<" + code
        return struct.unpack_from(layout, self._data, self._take(struct.calcsize(layout)))[0]

    def _string(self) -> str:
        length = self._scalar("Q")
        start = self._take(length)
        # Metadata may hold invalid UTF-8 in keys that are not used here.
        return self._data[start : start + length].decode("utf-8", errors="replace")

    def _type(self) -> GGUFValueType:
        number = self._scalar("I")
        try:
            return GGUFValueType(number)
        except ValueError:
            raise CheckpointError(
                f"{self._path}: metadata of unknown type {number} before byte {self._offset}: "
                "the file is damaged or newer than the installed gguf package"
            ) from None

    def _value(self, kind: GGUFValueType) -> Any:
        if kind == GGUFValueType.STRING:
            return self._string()
        if kind != GGUFValueType.ARRAY:
            return self._scalar(_SCALARS[kind])
        item, length = self._type(), self._scalar("Q")
        if item == GGUFValueType.STRING:
            return [self._string() for _ in range(length)]
        if item == GGUFValueType.ARRAY:
            raise CheckpointError(
                f"{self._path}: arrays of arrays in the metadata are not supported"
            )
        layout = f"<{length}{_SCALARS[item]}"
        size = length * struct.calcsize("<" + _SCALARS[item])
        start = self._take(size)  # before `layout` is compiled, because the length may be invalid
        return list(struct.unpack_from(layout, self._data, start))

    def _tensor_info(self) -> TensorInfo:
        name, num_dims = self._string(), self._scalar("I")
        shape = tuple(self._scalar("Q") for _ in range(num_dims))[::-1]
        number, offset = self._scalar("I"), self._scalar("Q")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            kind = None
        if kind is None or kind.name not in SUPPORTED_TYPES:
            raise CheckpointError(
                f"{self._path}: tensor {name!r} is stored as "
                f"{kind.name if kind else f'unknown type {number}'}, supported are "
                f"{', '.join(SUPPORTED_TYPES)}: take or make a file in one of these"
            )
        block, block_bytes = GGML_QUANT_SIZES[kind]
        num_values = 1
        for size in shape:
            num_values *= size
        if not shape or shape[-1] % block:
            raise CheckpointError(
                f"{self._path}: tensor {name!r} of shape {shape} does not divide into "
                f"{kind.name} blocks of {block}: the file is damaged"
            )
        return TensorInfo(name, kind, shape, offset, num_values // block * block_bytes)
