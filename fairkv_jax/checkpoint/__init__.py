"""Checkpoints: weights in head order, configuration and tokenizer, read on demand from disk."""

from fairkv_jax.checkpoint.base import Checkpoint, CheckpointError
from fairkv_jax.checkpoint.fetch import DEMO_MODEL, fetch_demo
from fairkv_jax.checkpoint.open import open_checkpoint

__all__ = ["DEMO_MODEL", "Checkpoint", "CheckpointError", "fetch_demo", "open_checkpoint"]
