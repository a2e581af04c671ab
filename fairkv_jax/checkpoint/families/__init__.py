"""The model families that can be loaded: one file each, one value in it.

A family that differs from these in its names and its options only is a new file with one more
value, and a line in `FAMILIES`.
"""

from fairkv_jax.checkpoint.families.family import Family
from fairkv_jax.checkpoint.families.llama import LLAMA
from fairkv_jax.checkpoint.families.mistral import MISTRAL

FAMILIES = (LLAMA, MISTRAL)

__all__ = ["FAMILIES", "Family"]
