"""What a GGUF file says of its model: the family, the configuration, the names of the tensors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fairkv_jax.checkpoint.base import CheckpointError
from fairkv_jax.checkpoint.families import FAMILIES, Family
from fairkv_jax.checkpoint.gguf_file import GGUFFile
from fairkv_jax.checkpoint.layout import split_name
from fairkv_jax.checkpoint.sliding_window import within_window
from fairkv_jax.config import ModelConfig

ROPE_DIVISORS = "rope_freqs.weight"
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
    "q_bias": "blk.{}.attn_q.bias",
    "k_bias": "blk.{}.attn_k.bias",
    "v_bias": "blk.{}.attn_v.bias",
    "q_norm": "blk.{}.attn_q_norm.weight",
    "k_norm": "blk.{}.attn_k_norm.weight",
}


def gguf_name(name: str) -> str:
    """The name of a canonical tensor in a GGUF file."""
    kind, index = split_name(name)
    return _GGUF_NAMES[kind].format(index)


def read_family(file: GGUFFile) -> Family:
    """The family of a file's architecture; raises as `read_config`."""
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
    context = get("context_length", int)
    if window := get("attention.sliding_window", int, 0):
        context = within_window(file.path, context, window)
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
        tie_word_embeddings=gguf_name("unembed") not in file.tensors,
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        rope_divisors=_rope_divisors(file),
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


def _rope_divisors(file: GGUFFile) -> tuple[float, ...] | None:
    """What a stretched model divides its frequencies by, which converters store as a tensor."""
    if ROPE_DIVISORS not in file.tensors:
        return None
    divisors = file.read(ROPE_DIVISORS).astype(np.float32).reshape(-1)
    if not np.all(np.isfinite(divisors) & (divisors > 0)):
        raise CheckpointError(
            f"{file.path}: tensor {ROPE_DIVISORS!r} must hold positive numbers: the file is damaged"
        )
    return tuple(divisors.tolist())


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
