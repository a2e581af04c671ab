"""A Hugging Face model folder as a `Checkpoint`: config.json, *.safetensors, tokenizer.json."""

import math
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
from fairkv_jax.checkpoint.files import read_object
from fairkv_jax.checkpoint.hf_tokenizer import build_tokenizer
from fairkv_jax.checkpoint.safetensors_file import open_safetensors
from fairkv_jax.config import ModelConfig
from fairkv_jax.models import FAMILIES, Family, param_specs
from fairkv_jax.plan import HeadScores, Profile
from fairkv_jax.tokenizer import Tokenizer

LM_HEAD = "lm_head.weight"
_MAX_HEAD_DIM = 1 << 16
"""Far above every model; a table of the rotary frequencies has half as many entries."""


class HFCheckpoint:
    """A model in the published layout, mapped into memory and read tensor by tensor.

    Raises:
        CheckpointError: a file cannot be read, the family is not supported, or the tensors do not
            match config.json.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.name = folder.resolve().name
        self.config = read_config(folder)
        self._files = open_safetensors(folder)
        check_num_layers(
            folder / "config.json",
            "num_hidden_layers",
            self.config.num_layers,
            len(self._files),
        )
        self._specs = param_specs(self.config)
        self._check_tensors()

    @property
    def profile(self) -> Profile | None:
        return read_profile(self._folder)

    @property
    def head_scores(self) -> HeadScores | None:
        return read_head_scores(self._folder)

    def names(self) -> tuple[str, ...]:
        return tuple(self._specs)

    def lazy(self, name: str) -> LazyTensor:
        if name not in self._specs:
            raise CheckpointError(f"{self._folder} has no tensor {name!r}: see names()")
        spec = self._specs[name]
        return head_order(spec, partial(self._files[spec.hf_name].read, spec.hf_name))

    def tensor(self, name: str) -> np.ndarray:
        return self.lazy(name).whole()

    def stored(self, name: str) -> Stored:
        stored = self._specs[name].hf_name
        info = self._files[stored].tensors[stored]
        return Stored(info.kind, info.num_bytes)

    def tokenizer(self) -> Tokenizer:
        return check_tokenizer(build_tokenizer(self._folder), self.config, self._folder)

    def _check_tensors(self) -> None:
        """Checks that the files hold exactly the model's tensors in their shapes."""
        expected = {spec.hf_name: spec for spec in self._specs.values()}
        # Some folders store the tied matrix twice, some store RoPE's tables: neither is read.
        ignored = {LM_HEAD} if self.config.tie_word_embeddings else set()
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
        for stored, spec in expected.items():
            found = self._files[stored].tensors[stored].shape
            if found != spec.stored_shape:
                raise CheckpointError(
                    f"{self._folder}: tensor {stored!r} has the shape {found}, but config.json "
                    f"requires {spec.stored_shape}: the two do not belong together"
                )


def read_config(folder: Path) -> ModelConfig:
    """The model's configuration from config.json.

    Raises:
        CheckpointError: config.json is missing, or its family or variant is not supported.
    """
    path = folder / "config.json"
    values = read_object(path)
    family = _family(path, values)
    # Recent files keep RoPE's parameters in an object, under newer names.
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"{path}: the RoPE parameters must be an object, got {rope!r}")
    values = dict(family.defaults) | values | rope
    if "type" in rope:  # the name of "rope_type" in older files
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
    return _model_config(_Values(path, values), family)


def _family(path: Path, values: dict[str, Any]) -> Family:
    found = values.get("architectures") or [None]
    for family in FAMILIES:
        if found == [family.hf_class]:
            return family
    raise CheckpointError(
        f"{path}: the architecture is {', '.join(map(str, found))}, supported are "
        f"{', '.join(family.hf_class for family in FAMILIES)}: choose a model of one of these"
    )


class _Values:
    """The values of a config.json, which are checked when they are read."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path, self._values = path, values

    def has(self, key: str) -> bool:
        return bool(self._values.get(key))

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of a key, checked to have this type and, for a number, to be positive.

        A missing or null value means the default.
        """
        value = self._values.get(key)
        value = default if value is None else value
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise CheckpointError(f"{self.path}: {key} must be {kind.__name__}, got {value!r}")
        if kind in (int, float) and not value > 0:
            raise CheckpointError(f"{self.path}: {key} must be positive, got {value!r}")
        return value


def _model_config(values: _Values, family: Family) -> ModelConfig:
    get = values.get
    hidden_size, num_heads = get("hidden_size", int), get("num_attention_heads", int)
    head_dim, theta = get("head_dim", int, hidden_size // num_heads), get("rope_theta", float)
    if head_dim > _MAX_HEAD_DIM:
        raise CheckpointError(f"{values.path}: head_dim must be at most {_MAX_HEAD_DIM}")
    sizes = {
        "vocab_size": get("vocab_size", int),
        "hidden_size": hidden_size,
        "intermediate_size": get("intermediate_size", int),
        "num_layers": get("num_hidden_layers", int),
        "num_heads": num_heads,
        "num_kv_heads": get("num_key_value_heads", int, num_heads),
        "head_dim": head_dim,
        "max_position_embeddings": _context(values),
        "rope_theta": theta,
        "rms_norm_eps": get("rms_norm_eps", float),
        "tie_word_embeddings": get("tie_word_embeddings", bool),
        "rope_divisors": _rope_divisors(values, head_dim, theta),
    }
    try:
        return ModelConfig(architecture=family.name, **sizes, **family.model_options)
    except ValueError as error:
        raise CheckpointError(f"{values.path}: {error}") from error


def _context(values: _Values) -> int:
    """The most tokens of a sequence, limited to the sliding window if there is one."""
    context = values.get("max_position_embeddings", int)
    if not values.has("sliding_window") or not values.get("use_sliding_window", bool, True):
        return context
    return context_within_window(values.path, context, values.get("sliding_window", int))


def _rope_divisors(values: _Values, head_dim: int, theta: float) -> tuple[float, ...] | None:
    get = values.get
    if get("rope_type", str, "default") != "llama3":
        return None
    low, high = get("low_freq_factor", float), get("high_freq_factor", float)
    if low >= high:
        raise CheckpointError(
            f"{values.path}: low_freq_factor {low} must be below high_freq_factor {high}"
        )
    return llama3_divisors(
        head_dim,
        theta,
        factor=get("factor", float),
        low_freq_factor=low,
        high_freq_factor=high,
        original_context=get("original_max_position_embeddings", int),
    )


def llama3_divisors(
    head_dim: int,
    theta: float,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_context: int,
) -> tuple[float, ...]:
    """Divisors of the H/2 rotary frequencies as Llama 3.1 scales them to long contexts.

    A pair of dimensions that turns at least `high_freq_factor` times within the original context
    has divisor 1. One that turns at most `low_freq_factor` times has divisor `factor`. The divisors
    in between are blended. They are rounded to float32, as GGUF files store them.
    """
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    turns = original_context / wavelengths
    fast = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
    divisors = 1 / (fast + (1 - fast) / factor)
    return tuple(divisors.astype(np.float32).tolist())
