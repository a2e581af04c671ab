"""Decoder families as Flax modules; attention is injected into them."""

from fairkv_jax.models.llama import Llama

__all__ = ["Llama"]
