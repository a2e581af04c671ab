"""The widths of a model that set what its heads cost, and those of models often asked about."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from fairkv_jax.config import ModelConfig


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder whose weights every decode step reads once."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_heads} query heads do not divide over {self.num_kv_heads} KV heads"
            )

    @classmethod
    def from_config(cls, config: ModelConfig) -> Self:
        """The shape of a model that the engine runs."""
        return cls(**{name: getattr(config, name) for name in cls.__dataclass_fields__})

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """Reads the JSON object that a profile holds."""
        missing = [name for name in cls.__dataclass_fields__ if name not in record]
        if missing:
            raise ValueError(f"the model's shape lacks {', '.join(missing)}")
        return cls(**{name: record[name] for name in cls.__dataclass_fields__})

    @property
    def head_params(self) -> int:
        """Weights of one KV head with its query heads: its parts of q, k, v and o."""
        group = self.num_heads // self.num_kv_heads
        return 2 * (group + 1) * self.head_dim * self.hidden_size

    @property
    def rest_params(self) -> int:
        """Weights that are sharded uniformly and read every step: the MLPs and the logits."""
        mlp = 3 * self.num_layers * self.hidden_size * self.intermediate_size
        return mlp + self.vocab_size * self.hidden_size


SHAPES: dict[str, ModelShape] = {
    "smollm2-135m": ModelShape(30, 576, 9, 3, 64, 1536, 49152),
    "llama-3-8b": ModelShape(32, 4096, 32, 8, 128, 14336, 128256),
    "llama-3.1-8b": ModelShape(32, 4096, 32, 8, 128, 14336, 128256),
    "llama-3.3-70b": ModelShape(80, 8192, 64, 8, 128, 28672, 128256),
    "mistral-small-24b": ModelShape(40, 5120, 32, 8, 128, 32768, 131072),
}
"""By name, in lower case."""


def find_shape(model: str) -> ModelShape | None:
    """The shape whose name is part of what a profile calls its model, or None if none is."""
    return next((shape for known, shape in SHAPES.items() if known in model.lower()), None)
