"""The model families that can be loaded.

A new family is a file in this package that declares a `Family`, and an entry in `FAMILIES`.
"""

from fairkv_jax.models.gemma import GEMMA
from fairkv_jax.models.llama import LLAMA, MISTRAL
from fairkv_jax.models.qwen import QWEN2, QWEN3

FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA)
