"""Messages as bytes: MessagePack with arrays as raw bytes and dataclasses by name, no pickle."""

from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import msgpack
import numpy as np

_ARRAY, _DATACLASS, _TUPLE = range(3)
_pack: Any = partial(msgpack.packb, strict_types=True)


class Codec:
    """Packs plain values, NumPy arrays, and instances of the given dataclasses."""

    def __init__(self, classes: Iterable[type]):
        self._classes = {cls.__name__: cls for cls in classes}

    def pack(self, value: Any) -> bytes:
        """Returns a value as bytes.

        Raises:
            TypeError: a part of it is of another type.
        """
        return _pack(value, default=self._default)

    def unpack(self, data: bytes) -> Any:
        """Returns the value that `pack` was given; arrays in it are read-only.

        Raises:
            ValueError: the bytes are not such a value.
        """
        try:
            return msgpack.unpackb(data, ext_hook=self._extension, strict_map_key=False)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"a message cannot be read: {error!r}") from error

    def _default(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            parts = [value.dtype.str, list(value.shape), value.tobytes()]
            return msgpack.ExtType(_ARRAY, _pack(parts))
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, tuple):
            return msgpack.ExtType(_TUPLE, self.pack(list(value)))
        name = type(value).__name__
        if is_dataclass(value) and self._classes.get(name) is type(value):
            parts = [name, *(getattr(value, each.name) for each in fields(value))]
            return msgpack.ExtType(_DATACLASS, self.pack(parts))
        raise TypeError(f"a {name} cannot be sent")

    def _extension(self, code: int, data: bytes) -> Any:
        parts = self.unpack(data)
        if code == _TUPLE:
            return tuple(parts)
        if code == _ARRAY:
            dtype, shape, content = parts
            return np.frombuffer(content, np.dtype(dtype)).reshape(shape)
        if code != _DATACLASS:
            raise ValueError(f"unknown type {code}")
        name, *values = parts
        cls = self._classes[name]
        if len(values) != len(fields(cls)):
            raise ValueError(f"a {name} has {len(fields(cls))} fields, got {len(values)}")
        return cls(*values)
