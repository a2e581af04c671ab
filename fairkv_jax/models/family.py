"""What distinguishes one model family from another."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """How published files name a family, and how its models differ from Llama."""

    name: str
    """`ModelConfig.architecture` of its models."""
    hf_class: str
    """The name under "architectures" in config.json."""
    defaults: Mapping[str, Any]
    """Values of config.json's keys that a file may leave out."""
    required: Mapping[str, tuple[Any, ...]]
    """The supported values of keys in config.json; a file may leave these keys out."""
    model_options: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `ModelConfig` that are the same for all models of the family."""
    gguf_architecture: str | None = None
    """`general.architecture` in GGUF files; None if converters write another family's name."""
    gguf_interleaves: bool = False
    """Whether converters to GGUF interleave the two halves of query and key heads."""
