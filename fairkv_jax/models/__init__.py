"""Decoder families: their files' declarations and tensors, and the modules that run them.

Importing this package does not import JAX; `models.model` and `models.decoder` do.
"""

from fairkv_jax.models.family import Family
from fairkv_jax.models.params import ParamSpec, param_specs
from fairkv_jax.models.registry import FAMILIES

__all__ = ["FAMILIES", "Family", "ParamSpec", "param_specs"]
