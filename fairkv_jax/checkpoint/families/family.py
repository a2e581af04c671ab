"""What tells one model family from another in its published files."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """How a family's files name it, what its models have, and which options the engine can run."""

    name: str
    """`ModelConfig.architecture` of its models."""
    hf_class: str
    """The name under "architectures" in config.json."""
    defaults: Mapping[str, Any]
    """What keys of config.json mean where they are left out."""
    required: Mapping[str, tuple[Any, ...]]
    """Keys of config.json that must hold one of these values, or be left out."""
    qkv_bias: bool = False
    qk_norm: bool = False
    gguf_architecture: str | None = None
    """Its `general.architecture`, None where the converters write another family's."""
    gguf_interleaves: bool = False
    """Whether converters to GGUF interleave the halves of q and k heads."""
