"""A GGUF file as a `Checkpoint`: its architecture's names, shapes and row order, undone."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fairkv_jax.checkpoint.base import CheckpointError, Stored, check_tokenizer
from fairkv_jax.checkpoint.families import FAMILIES, Family
from fairkv_jax.checkpoint.gguf_file import GGUFFile
from fairkv_jax.checkpoint.gguf_tokenizer import build_tokenizer
from fairkv_jax.checkpoint.layout import (
    split_name,
    stored_shape,
    tensor_shapes,
    to_head_order,
)
from fairkv_jax.config import ModelConfig
from fairkv_jax.tokenizer import Tokenizer

_BY_ARCHITECTURE = {
    family.gguf_architecture: family for family in FAMILIES if family.gguf_architecture
}

_GGUF_NAMES = {
    "embed": "token_embd.weight",
    "norm": "output_norm.weight",
    "unembed": "output.weight",
    "attn_norm": "blk.{}.attn_norm.weight",
    "q": "blk.{}.attn_q.weight",
    "k": "blk.{}.attn_k.weight",
    "v": "blk.{}.attn_v.weight",
    "o": "blk.{}.attn_output.weight",
    "mlp_norm": "blk.{}.ffn_norm.weight",
    "gate": "blk.{}.ffn_gate.weight",
    "up": "blk.{}.ffn_up.weight",
    "down": "blk.{}.ffn_down.weight",
}


class GGUFCheckpoint:
    """A model in one GGUF file, dequantised tensor by tensor.

    Raises:
        CheckpointError: the file cannot be read, is of another architecture, or its tensors are
            not those that its metadata announce.
    """

    def __init__(self, path: Path) -> None:
        self._file = GGUFFile(path)
        self.name = model_name(path)
        self._family = _family(self._file)
        self.config = read_config(self._file, self._family)
        self._shapes = tensor_shapes(self.config)
        self._check_tensors()

    def names(self) -> tuple[str, ...]:
        return tuple(self._shapes)

    def tensor(self, name: str) -> np.ndarray:
        """One tensor in head order; see `Checkpoint.tensor`."""
        if name not in self._shapes:
            raise CheckpointError(f"{self._file.path} has no tensor {name!r}: see names()")
        stored = self._file.read(gguf_name(name))
        kind, _ = split_name(name)
        if kind in ("q", "k") and self._family.gguf_interleaves:
            stored = halves_from_pairs(stored, self.config.head_dim)
        return to_head_order(name, stored, self._shapes[name])

    def stored(self, name: str) -> Stored:
        info = self._file.tensors[gguf_name(name)]
        return Stored(info.kind.name, info.num_bytes)

    def tokenizer(self) -> Tokenizer:
        return check_tokenizer(build_tokenizer(self._file), self.config, self._file.path)

    def _check_tensors(self) -> None:
        """The file must hold the model's tensors in their shapes, and none beside them.

        An unknown tensor is a bias, a norm or a table of RoPE factors that the engine would
        silently leave out.
        """
        path, tensors = self._file.path, self._file.tensors
        expected = {gguf_name(name): (name, shape) for name, shape in self._shapes.items()}
        if missing := [name for name in expected if name not in tensors]:
            raise CheckpointError(
                f"{path} lacks {len(missing)} of {len(expected)} tensors, the first {missing[0]!r}"
                ": the conversion was incomplete, or this is one part of a split file (merge it "
                "with llama.cpp's gguf-split)"
            )
        if extra := [name for name in tensors if name not in expected]:
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


def gguf_name(name: str) -> str:
    """The name of a canonical tensor in a GGUF file."""
    kind, index = split_name(name)
    return _GGUF_NAMES[kind].format(index)


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


def _family(file: GGUFFile) -> Family:
    architecture = file.metadata.get("general.architecture")
    if architecture not in _BY_ARCHITECTURE:
        raise CheckpointError(
            f"{file.path} is of the architecture {architecture!r}, supported are "
            f"{', '.join(_BY_ARCHITECTURE)}: choose a checkpoint of one of these"
        )
    return _BY_ARCHITECTURE[architecture]


def read_config(file: GGUFFile, family: Family) -> ModelConfig:
    """The model's configuration from a file's metadata.

    Raises:
        CheckpointError: a variant of the family that the engine cannot run.
    """
    get = _metadata_reader(file, family.gguf_architecture)
    hidden_size, num_heads = get("embedding_length", int), get("attention.head_count", int)
    head_dim = get("attention.key_length", int, hidden_size // max(num_heads, 1))
    config = _checked(
        file.path,
        architecture=family.name,
        vocab_size=_vocab_size(file),
        hidden_size=hidden_size,
        intermediate_size=get("feed_forward_length", int),
        num_layers=get("block_count", int),
        num_heads=num_heads,
        num_kv_heads=get("attention.head_count_kv", int, num_heads),
        head_dim=head_dim,
        max_position_embeddings=get("context_length", int),
        rope_theta=get("rope.freq_base", float, 10000.0),
        rms_norm_eps=_shortest(get("attention.layer_norm_rms_epsilon", float)),
        tie_word_embeddings=gguf_name("unembed") not in file.tensors,
    )
    _refuse(file.path, "rope.scaling.type", get("rope.scaling.type", str, "none"), "none")
    _refuse(file.path, "rope.dimension_count", get("rope.dimension_count", int, head_dim), head_dim)
    value_length = get("attention.value_length", int, head_dim)
    _refuse(file.path, "attention.value_length", value_length, head_dim)
    _refuse(file.path, "expert_count", get("expert_count", int, 0), 0)
    return config


def _metadata_reader(file: GGUFFile, architecture: str | None) -> Callable[..., Any]:
    """A function that reads `key` of the architecture as a type, with an optional default."""

    def get(key: str, kind: type, default: Any = None) -> Any:
        value = file.metadata.get(f"{architecture}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, kind):
            raise CheckpointError(
                f"{file.path}: {architecture}.{key} must be {kind.__name__}, got {value!r}: "
                "the metadata are incomplete or this variant is not supported"
            )
        return value

    return get


def _vocab_size(file: GGUFFile) -> int:
    embedding = file.tensors.get(gguf_name("embed"))
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(
            f"{file.path} has no embedding matrix {gguf_name('embed')!r}: it holds no whole model"
        )
    return embedding.shape[0]


def _shortest(value: float) -> float:
    """The shortest decimal that is this float32: metadata store 1e-5 as 9.99999974e-06."""
    return float(str(np.float32(value)))


def _checked(path: Path, **sizes: Any) -> ModelConfig:
    for name, value in sizes.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and value <= 0:
            raise CheckpointError(f"{path}: {name} must be positive, got {value}")
    try:
        return ModelConfig(**sizes)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _refuse(path: Path, key: str, value: object, supported: object) -> None:
    if value != supported:
        raise CheckpointError(
            f"{path}: {key} is {value!r}, only {supported!r} is supported: choose another variant"
        )
