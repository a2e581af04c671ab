"""FairKV in JAX: per-head compressed KV caches, balanced over a mesh of devices."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fairkv_jax.engine.llm import LLM
    from fairkv_jax.sampling_params import SamplingParams

__version__ = "0.2.0.dev0"
__all__ = ["LLM", "SamplingParams", "__version__"]

_LAZY = {"LLM": "fairkv_jax.engine.llm", "SamplingParams": "fairkv_jax.sampling_params"}


def __getattr__(name: str):
    """Import the public classes on first use, so that the planner never loads JAX."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
