"""A GGUF file as a `Checkpoint`: its architecture's names, shapes and row order, undone."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from fairkv_jax.checkpoint.base import (
    CheckpointError,
    LazyTensor,
    Stored,
    check_tokenizer,
    read_profile,
)
from fairkv_jax.checkpoint.gguf_config import ROPE_DIVISORS, gguf_name, read_config, read_family
from fairkv_jax.checkpoint.gguf_file import GGUFFile
from fairkv_jax.checkpoint.gguf_tokenizer import build_tokenizer
from fairkv_jax.checkpoint.layout import (
    head_order,
    split_name,
    stored_shape,
    tensor_shapes,
)
from fairkv_jax.plan import Profile
from fairkv_jax.tokenizer import Tokenizer


class GGUFCheckpoint:
    """A model in one GGUF file, dequantised tensor by tensor.

    Raises:
        CheckpointError: the file cannot be read, is of another architecture, or its tensors are
            not those that its metadata announce.
    """

    def __init__(self, path: Path) -> None:
        self._file = GGUFFile(path)
        self.name = model_name(path)
        self._family = read_family(self._file)
        self.config = read_config(self._file, self._family)
        self._shapes = tensor_shapes(self.config)
        self._check_tensors()

    @property
    def profile(self) -> Profile | None:
        return read_profile(self._file.path.parent)

    def names(self) -> tuple[str, ...]:
        return tuple(self._shapes)

    def lazy(self, name: str) -> LazyTensor:
        if name not in self._shapes:
            raise CheckpointError(f"{self._file.path} has no tensor {name!r}: see names()")
        shape, stored = self._shapes[name], gguf_name(name)
        read = partial(self._file.read, stored)
        if split_name(name)[0] in ("q", "k") and self._family.gguf_interleaves:
            return head_order(name, shape, self._reordered(read))
        return head_order(name, shape, read)

    def _reordered(self, read: Callable[[int, int], np.ndarray]) -> Callable[..., np.ndarray]:
        head_dim = self.config.head_dim
        return lambda start, stop: halves_from_pairs(read(start, stop), head_dim)

    def tensor(self, name: str) -> np.ndarray:
        return self.lazy(name).whole()

    def stored(self, name: str) -> Stored:
        info = self._file.tensors[gguf_name(name)]
        return Stored(info.kind.name, info.num_bytes)

    def tokenizer(self) -> Tokenizer:
        return check_tokenizer(build_tokenizer(self._file), self.config, self._file.path)

    def _check_tensors(self) -> None:
        """The file must hold the model's tensors in their shapes, and none beside them.

        An unknown tensor is a bias or a norm that the engine would silently leave out.
        """
        path, tensors = self._file.path, self._file.tensors
        expected = {gguf_name(name): (name, shape) for name, shape in self._shapes.items()}
        if missing := [name for name in expected if name not in tensors]:
            raise CheckpointError(
                f"{path} lacks {len(missing)} of {len(expected)} tensors, the first {missing[0]!r}"
                ": the conversion was incomplete, or this is one part of a split file (merge it "
                "with llama.cpp's gguf-split)"
            )
        known = expected.keys() | {ROPE_DIVISORS}
        if extra := [name for name in tensors if name not in known]:
            raise CheckpointError(
                f"{path} holds {len(extra)} tensors that the architecture "
                f"{self.config.architecture!r} is not known to use, the first {extra[0]!r}: "
                "this variant is not supported"
            )
        for stored, (name, shape) in expected.items():
            if tensors[stored].shape != stored_shape(name, shape):
                raise CheckpointError(
                    f"{path}: tensor {stored!r} has the shape {tensors[stored].shape}, the "
                    f"metadata call for {stored_shape(name, shape)}: the file is damaged"
                )


def model_name(path: Path) -> str:
    """The file's name without its ending and the mark of its quantisation."""
    return re.sub(r"[.-](I?Q\d\w*|B?F16|F32)$", "", path.stem, flags=re.IGNORECASE)


def halves_from_pairs(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorders the rows of a [heads*H, D] projection for rotate-half RoPE.

    llama.cpp rotates neighbouring rows (2i, 2i+1), so its converter interleaves the halves of
    each Llama head; the engine rotates rows (i, i + H/2), as the models were published.
    """
    rows, width = weight.shape
    pairs = weight.reshape(rows // head_dim, head_dim // 2, 2, width)
    return pairs.swapaxes(1, 2).reshape(rows, width)
