"""The sizes of a model that determine the cost of its heads, and those of well-known models."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from fairkv_jax.config import ModelConfig
from fairkv_jax.models.params import MLP, SLOT, VOCAB, decoder_params


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder, from which the number of its weights follows.

    >>> from fairkv_jax.plan import ModelShape
    >>> shape = ModelShape(
    ...     num_layers=32, hidden_size=4096, num_heads=32, num_kv_heads=8, head_dim=128,
    ...     intermediate_size=14336, vocab_size=128256,
    ... )
    >>> shape.head_params  # q of 4 heads, k, v, and o of 4 heads
    5242880
    """

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
        """Returns the shape of a model configuration."""
        return cls(**{name: getattr(config, name) for name in cls.__dataclass_fields__})

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """Parses the `shape` object of a profile's JSON."""
        missing = [name for name in cls.__dataclass_fields__ if name not in record]
        if missing:
            raise ValueError(f"the model's shape lacks {', '.join(missing)}")
        return cls(**{name: record[name] for name in cls.__dataclass_fields__})

    @property
    def head_params(self) -> int:
        """Number of weights of one KV head and its query heads in the q, k, v and o projections."""
        return self._num_weights(SLOT) // (self.num_layers * self.num_kv_heads)

    @property
    def rest_params(self) -> int:
        """Number of weights that are sharded evenly: those of the MLPs and of the logits."""
        return self._num_weights(MLP) + self._num_weights(VOCAB)

    def _num_weights(self, axis: str) -> int:
        """Returns the number of weights in all matrices with an axis; embeddings count once."""
        return sum(math.prod(spec.shape) for spec in decoder_params(self) if axis in spec.axes)


SHAPES: dict[str, ModelShape] = {
    "smollm2-135m": ModelShape(30, 576, 9, 3, 64, 1536, 49152),
    "llama-3-8b": ModelShape(32, 4096, 32, 8, 128, 14336, 128256),
    "llama-3.1-8b": ModelShape(32, 4096, 32, 8, 128, 14336, 128256),
    "llama-3.3-70b": ModelShape(80, 8192, 64, 8, 128, 28672, 128256),
    "mistral-small-24b": ModelShape(40, 5120, 32, 8, 128, 32768, 131072),
}
"""Shapes of well-known models by lower-case name."""


def find_shape(model: str) -> ModelShape | None:
    """Returns the shape whose name is contained in the model's name, or None.

    >>> from fairkv_jax.plan import find_shape
    >>> find_shape("meta-llama/Llama-3.1-8B-Instruct").num_kv_heads
    8
    """
    return next((shape for known, shape in SHAPES.items() if known in model.lower()), None)
