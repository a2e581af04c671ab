"""A GGUF file as a `Checkpoint`: its family, its configuration, and its tensors in head order.

Converters to GGUF change some tensors; the reader undoes it. Llama's query and key rows are
interleaved, and norms that scale by an offset plus their weight (Gemma) hold the sum.
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fairkv_jax.checkpoint.base import (
    CheckpointError,
    LazyTensor,
    Stored,
    check_num_layers,
    check_tokenizer,
    context_within_window,
    head_order,
    read_head_scores,
    read_profile,
)
from fairkv_jax.checkpoint.gguf_file import GGUFFile
from fairkv_jax.checkpoint.gguf_tokenizer import build_tokenizer
from fairkv_jax.config import ModelConfig
from fairkv_jax.models import FAMILIES, Family, param_specs
from fairkv_jax.plan import HeadScores, Profile
from fairkv_jax.tokenizer import Tokenizer

EMBEDDING, OUTPUT, ROPE_DIVISORS = "token_embd.weight", "output.weight", "rope_freqs.weight"
_BY_ARCHITECTURE = {
    family.gguf_architecture: family for family in FAMILIES if family.gguf_architecture
}


class GGUFCheckpoint:
    """A model in one GGUF file, dequantised tensor by tensor.

    Raises:
        CheckpointError: the file cannot be read, has an unsupported architecture, or its tensors
            do not match its metadata.
    """

    def __init__(self, path: Path) -> None:
        self._file = GGUFFile(path)
        self.name = model_name(path)
        self._family = read_family(self._file)
        self.config = read_config(self._file, self._family)
        self._specs = param_specs(self.config)
        self._check_tensors()

    @property
    def profile(self) -> Profile | None:
        return read_profile(self._file.path.parent)

    @property
    def head_scores(self) -> HeadScores | None:
        return read_head_scores(self._file.path.parent)

    def names(self) -> tuple[str, ...]:
        return tuple(self._specs)

    def lazy(self, name: str) -> LazyTensor:
        if name not in self._specs:
            raise CheckpointError(f"{self._file.path} has no tensor {name!r}: see names()")
        spec = self._specs[name]
        read = partial(self._file.read, spec.gguf_name)
        kind = name.rpartition(".")[2]
        if kind in ("q", "k") and self._family.gguf_interleaves:
            return head_order(spec, self._deinterleaved(read))
        if kind.endswith("norm") and self.config.norm_offset:
            return head_order(spec, lambda start, stop: read(start, stop) - self._norm_offset)
        return head_order(spec, read)

    @property
    def _norm_offset(self) -> np.float32:
        return np.float32(self.config.norm_offset)

    def _deinterleaved(self, read: Callable[[int, int], np.ndarray]) -> Callable[..., np.ndarray]:
        head_dim = self.config.head_dim
        return lambda start, stop: halves_from_pairs(read(start, stop), head_dim)

    def tensor(self, name: str) -> np.ndarray:
        return self.lazy(name).whole()

    def stored(self, name: str) -> Stored:
        info = self._file.tensors[self._specs[name].gguf_name]
        return Stored(info.kind.name, info.num_bytes)

    def tokenizer(self) -> Tokenizer:
        return check_tokenizer(build_tokenizer(self._file), self.config, self._file.path)

    def _check_tensors(self) -> None:
        """Checks that the file holds exactly the model's tensors in their shapes.

        An unknown tensor may be a bias or a norm, which the engine would silently leave out.
        """
        path, tensors = self._file.path, self._file.tensors
        expected = {spec.gguf_name: spec for spec in self._specs.values()}
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
        for stored, spec in expected.items():
            if tensors[stored].shape != spec.stored_shape:
                raise CheckpointError(
                    f"{path}: tensor {stored!r} has the shape {tensors[stored].shape}, but the "
                    f"metadata require {spec.stored_shape}: the file is damaged"
                )


def model_name(path: Path) -> str:
    """The file's name without its suffix and the name of its quantization."""
    return re.sub(r"[.-](I?Q\d\w*|B?F16|F32)$", "", path.stem, flags=re.IGNORECASE)


def halves_from_pairs(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorders the rows of a [heads*H, D] projection for rotate-half RoPE.

    llama.cpp rotates neighbouring rows (2i, 2i+1), so its converter interleaves the halves of
    each Llama head. The engine rotates rows (i, i + H/2), as in the published models.
    """
    rows, hidden_size = weight.shape
    pairs = weight.reshape(rows // head_dim, head_dim // 2, 2, hidden_size)
    return pairs.swapaxes(1, 2).reshape(rows, hidden_size)


def read_family(file: GGUFFile) -> Family:
    """The family of the file's architecture; raises as `read_config`."""
    architecture = file.metadata.get("general.architecture")
    if architecture not in _BY_ARCHITECTURE:
        raise CheckpointError(
            f"{file.path} has the architecture {architecture!r}, supported are "
            f"{', '.join(_BY_ARCHITECTURE)}: choose a checkpoint of one of these"
        )
    return _BY_ARCHITECTURE[architecture]


def read_config(file: GGUFFile, family: Family) -> ModelConfig:
    """The model's configuration, from the file's metadata.

    Raises:
        CheckpointError: the engine cannot run this variant of the family.
    """
    get = _metadata_reader(file, family.gguf_architecture)
    hidden_size, num_heads = get("embedding_length", int), get("attention.head_count", int)
    head_dim = get("attention.key_length", int, hidden_size // max(num_heads, 1))
    context = get("context_length", int)
    if window := get("attention.sliding_window", int, 0):
        context = context_within_window(file.path, context, window)
    check_num_layers(file.path, "block_count", get("block_count", int), len(file.tensors))
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
        max_position_embeddings=context,
        rope_theta=get("rope.freq_base", float, 10000.0),
        rms_norm_eps=_shortest(get("attention.layer_norm_rms_epsilon", float)),
        tie_word_embeddings=OUTPUT not in file.tensors,
        rope_divisors=_rope_divisors(file),
        **family.model_options,
    )
    _refuse(file.path, "rope.scaling.type", get("rope.scaling.type", str, "none"), "none")
    _refuse(file.path, "rope.dimension_count", get("rope.dimension_count", int, head_dim), head_dim)
    value_length = get("attention.value_length", int, head_dim)
    _refuse(file.path, "attention.value_length", value_length, head_dim)
    _refuse(file.path, "expert_count", get("expert_count", int, 0), 0)
    return config


def _metadata_reader(file: GGUFFile, architecture: str | None) -> Callable[..., Any]:
    """A function that reads an architecture's key as a type, with an optional default."""

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
    embedding = file.tensors.get(EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(
            f"{file.path} has no embedding matrix {EMBEDDING!r}: the model is not complete"
        )
    return embedding.shape[0]


def _rope_divisors(file: GGUFFile) -> tuple[float, ...] | None:
    """The divisors of the rotary frequencies, which converters store as a tensor (Llama 3.1)."""
    if ROPE_DIVISORS not in file.tensors:
        return None
    divisors = file.read(ROPE_DIVISORS).astype(np.float32).reshape(-1)
    if not np.all(np.isfinite(divisors) & (divisors > 0)):
        raise CheckpointError(
            f"{file.path}: tensor {ROPE_DIVISORS!r} must hold positive numbers: the file is damaged"
        )
    return tuple(divisors.tolist())


def _shortest(value: float) -> float:
    """The shortest decimal of a float32: metadata store 1e-5 as 9.99999974e-06."""
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
