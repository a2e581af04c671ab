"""The model families that can be loaded: one file each, one value in it.

A family that differs from these in its names and its options only is a new file with one more
value, and a line in `FAMILIES`.
"""

from fairkv_jax.checkpoint.families.family import Family
from fairkv_jax.checkpoint.families.llama import LLAMA
from fairkv_jax.checkpoint.families.mistral import MISTRAL
from fairkv_jax.checkpoint.families.qwen2 import QWEN2
from fairkv_jax.checkpoint.families.qwen3 import QWEN3

FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3)

__all__ = ["FAMILIES", "Family"]
