"""The model's configuration from a Hugging Face folder's config.json."""

from pathlib import Path
from typing import Any

from fairkv_jax.checkpoint.base import CheckpointError
from fairkv_jax.checkpoint.families import FAMILIES, Family
from fairkv_jax.checkpoint.json_file import read_object
from fairkv_jax.checkpoint.rope_scaling import llama3_divisors
from fairkv_jax.checkpoint.sliding_window import within_window
from fairkv_jax.config import ModelConfig


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
    """The values of a config.json, each checked as it is asked for."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path, self._values = path, values

    def has(self, key: str) -> bool:
        return bool(self._values.get(key))

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of a key, of that type, positive if a number; null means the default."""
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
        "qkv_bias": family.qkv_bias,
        "qk_norm": family.qk_norm,
        "rope_divisors": _rope_divisors(values, head_dim, theta),
    }
    try:
        return ModelConfig(architecture=family.name, **sizes)
    except ValueError as error:
        raise CheckpointError(f"{values.path}: {error}") from error


def _context(values: _Values) -> int:
    """The tokens of a sequence; no more than a sliding window, within which attention is full."""
    context = values.get("max_position_embeddings", int)
    if not values.has("sliding_window") or not values.get("use_sliding_window", bool, True):
        return context
    return within_window(values.path, context, values.get("sliding_window", int))


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
