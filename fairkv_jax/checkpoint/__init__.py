"""Checkpoints: weights in head order, configuration and tokenizer, read lazily from disk."""

from fairkv_jax.checkpoint.base import Checkpoint, CheckpointError
from fairkv_jax.checkpoint.open import open_checkpoint

__all__ = ["Checkpoint", "CheckpointError", "open_checkpoint"]
