"""A Hugging Face model folder as a `Checkpoint`: config.json, *.safetensors, tokenizer.json."""

from pathlib import Path
from typing import Any

import numpy as np

from fairkv_jax.checkpoint.base import CheckpointError, Stored, check_tokenizer
from fairkv_jax.checkpoint.families import FAMILIES, Family
from fairkv_jax.checkpoint.hf_tokenizer import build_tokenizer
from fairkv_jax.checkpoint.json_file import read_object
from fairkv_jax.checkpoint.layout import split_name, stored_shape, tensor_shapes, to_head_order
from fairkv_jax.checkpoint.safetensors_file import open_safetensors
from fairkv_jax.config import ModelConfig
from fairkv_jax.tokenizer import Tokenizer

_HF_NAMES = {
    "embed": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "unembed": "lm_head.weight",
    "attn_norm": "model.layers.{}.input_layernorm.weight",
    "q": "model.layers.{}.self_attn.q_proj.weight",
    "k": "model.layers.{}.self_attn.k_proj.weight",
    "v": "model.layers.{}.self_attn.v_proj.weight",
    "o": "model.layers.{}.self_attn.o_proj.weight",
    "mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
    "gate": "model.layers.{}.mlp.gate_proj.weight",
    "up": "model.layers.{}.mlp.up_proj.weight",
    "down": "model.layers.{}.mlp.down_proj.weight",
}


class HFCheckpoint:
    """A model in the published layout, mapped into memory and read tensor by tensor.

    Raises:
        CheckpointError: a file cannot be read, the family is not supported, or the tensors are
            not those that config.json announces.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.name = folder.resolve().name
        self.config = read_config(folder)
        self._files = open_safetensors(folder)
        self._shapes = tensor_shapes(self.config)
        self._check_tensors()

    def names(self) -> tuple[str, ...]:
        return tuple(self._shapes)

    def tensor(self, name: str) -> np.ndarray:
        """One tensor in head order; see `Checkpoint.tensor`."""
        if name not in self._shapes:
            raise CheckpointError(f"{self._folder} has no tensor {name!r}: see names()")
        stored = self._files[hf_name(name)].read(hf_name(name))
        return to_head_order(name, stored, self._shapes[name])

    def stored(self, name: str) -> Stored:
        info = self._files[hf_name(name)].tensors[hf_name(name)]
        return Stored(info.kind, info.num_bytes)

    def tokenizer(self) -> Tokenizer:
        return check_tokenizer(build_tokenizer(self._folder), self.config, self._folder)

    def _check_tensors(self) -> None:
        """The files must hold the model's tensors in their shapes, and none beside them."""
        expected = {hf_name(name): (name, shape) for name, shape in self._shapes.items()}
        # Some folders store the tied matrix twice, some the tables of RoPE: neither is read.
        ignored = {hf_name("unembed")} if self.config.tie_word_embeddings else set()
        if missing := [name for name in expected if name not in self._files]:
            raise CheckpointError(
                f"{self._folder} lacks {len(missing)} of {len(expected)} tensors, the first "
                f"{missing[0]!r}: fetch it again, whole"
            )
        known = expected.keys() | ignored
        extra = [name for name in self._files if name not in known]
        if extra := [name for name in extra if not name.endswith("rotary_emb.inv_freq")]:
            raise CheckpointError(
                f"{self._folder} holds {len(extra)} tensors that the family "
                f"{self.config.architecture} is not known to use, the first {extra[0]!r}: "
                "this variant is not supported"
            )
        for stored, (name, shape) in expected.items():
            found = self._files[stored].tensors[stored].shape
            if found != stored_shape(name, shape):
                raise CheckpointError(
                    f"{self._folder}: tensor {stored!r} has the shape {found}, config.json calls "
                    f"for {stored_shape(name, shape)}: the two do not belong together"
                )


def hf_name(name: str) -> str:
    """The name of a canonical tensor in a Hugging Face folder."""
    kind, index = split_name(name)
    return _HF_NAMES[kind].format(index)


def read_config(folder: Path) -> ModelConfig:
    """The model's configuration from config.json.

    Raises:
        CheckpointError: there is none, of another family, or of a variant that is not supported.
    """
    path = folder / "config.json"
    values = read_object(path)
    family = _family(path, values)
    # Recent files keep what belongs to RoPE in an object of its own, under newer names.
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"{path}: the RoPE parameters must be an object, got {rope!r}")
    values = dict(family.defaults) | values | rope
    if "type" in rope:  # what older files call "rope_type"
        values["rope_type"] = rope["type"]
    for key, supported in family.required.items():
        if key in values and values[key] not in supported:
            raise CheckpointError(
                f"{path}: {key} is {values[key]!r}, supported for {family.name} is "
                f"{', '.join(map(repr, supported))}: choose another model"
            )
    if values.get("quantization_config"):
        raise CheckpointError(
            f"{path}: the weights are quantised (quantization_config): take the model as it was "
            "published in bfloat16, or a GGUF file"
        )
    return _model_config(path, family, values)


def _family(path: Path, values: dict[str, Any]) -> Family:
    found = values.get("architectures") or [None]
    for family in FAMILIES:
        if found == [family.hf_class]:
            return family
    raise CheckpointError(
        f"{path}: the architecture is {', '.join(map(str, found))}, supported are "
        f"{', '.join(family.hf_class for family in FAMILIES)}: choose a model of one of these"
    )


def _model_config(path: Path, family: Family, values: dict[str, Any]) -> ModelConfig:
    def get(key: str, kind: type, default: Any = None) -> Any:
        value = values.get(key)
        value = default if value is None else value
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise CheckpointError(f"{path}: {key} must be {kind.__name__}, got {value!r}")
        if kind is not bool and value <= 0:
            raise CheckpointError(f"{path}: {key} must be positive, got {value!r}")
        return value

    hidden_size, num_heads = get("hidden_size", int), get("num_attention_heads", int)
    context = get("max_position_embeddings", int)
    if values.get("sliding_window") and values.get("use_sliding_window", True):
        context = min(context, get("sliding_window", int))
    sizes = {
        "vocab_size": get("vocab_size", int),
        "hidden_size": hidden_size,
        "intermediate_size": get("intermediate_size", int),
        "num_layers": get("num_hidden_layers", int),
        "num_heads": num_heads,
        "num_kv_heads": get("num_key_value_heads", int, num_heads),
        "head_dim": get("head_dim", int, hidden_size // num_heads),
        "max_position_embeddings": context,
        "rope_theta": get("rope_theta", float),
        "rms_norm_eps": get("rms_norm_eps", float),
        "tie_word_embeddings": get("tie_word_embeddings", bool),
    }
    try:
        return ModelConfig(architecture=family.name, **sizes)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
