"""Frozen configurations: the model's shape, KV-cache compression, and how the engine runs.

The fields that users may set are declared as options, from which the command lines, the keyword
arguments of `LLM` and README's table derive. Standard library only, so that the planner and the
tools can read configurations without importing JAX.
"""

from fairkv_jax.config.engine_config import (
    DTYPES,
    KV_CACHE_DTYPES,
    QUANTIZATIONS,
    BuildOptions,
    EngineConfig,
    page_dtype,
)
from fairkv_jax.config.grammar_limits import GrammarLimits
from fairkv_jax.config.kv_config import (
    ALLOCATOR_NAMES,
    POLICIES,
    REQUEST_POLICIES,
    SCORER_NAMES,
    KVConfig,
    takes_budget,
)
from fairkv_jax.config.model_config import ModelConfig
from fairkv_jax.options import options_of

ENGINE_CLASSES = (BuildOptions, EngineConfig, KVConfig, GrammarLimits)
ENGINE_OPTIONS = options_of(*ENGINE_CLASSES)
"""Everything that `LLM` and `python -m fairkv_jax.serve` accept for the engine."""

__all__ = [
    "ALLOCATOR_NAMES",
    "DTYPES",
    "ENGINE_CLASSES",
    "ENGINE_OPTIONS",
    "KV_CACHE_DTYPES",
    "POLICIES",
    "QUANTIZATIONS",
    "REQUEST_POLICIES",
    "SCORER_NAMES",
    "BuildOptions",
    "EngineConfig",
    "GrammarLimits",
    "KVConfig",
    "ModelConfig",
    "page_dtype",
    "takes_budget",
]
