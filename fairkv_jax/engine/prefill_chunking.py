"""How the work of a prefill is divided into chunks; plain arithmetic that host and devices share.

A chunk is a block of prompt tokens in one layer. Chunks are counted layer by layer; after those of
the layers follow, if requested, blocks of the prompt's own log-probabilities:

    layer 0: 0, 1, .. | layer 1: n, n + 1, .. | ... | log-probabilities: L*n, ..
"""

from dataclasses import dataclass

import numpy as np

from fairkv_jax.config import EngineConfig, ModelConfig

MIN_PREFILL_BUCKET = 32
_LOGPROBS_BLOCK = 128
"""Prompt tokens whose logits are on the devices at a time."""


@dataclass(frozen=True)
class PrefillChunking:
    """How the prefill of one prompt is divided into chunks."""

    num_tokens: int
    bucket: int
    """The compiled prompt length."""
    chunk_size: int
    num_layers: int
    wants_logprobs: bool = False

    @classmethod
    def of(
        cls, num_tokens: int, model: ModelConfig, config: EngineConfig, *, wants_logprobs: bool
    ) -> "PrefillChunking":
        """The chunks of a prompt of `num_tokens`."""
        bucket = prefill_bucket(num_tokens, config)
        chunk_size = chunk_size_of(bucket, config)
        return cls(num_tokens, bucket, chunk_size, model.num_layers, wants_logprobs)

    @property
    def num_layer_chunks(self) -> int:
        """Chunks of all layers."""
        return self.num_layers * -(-self.num_tokens // self.chunk_size)

    @property
    def num_chunks(self) -> int:
        """Chunks of the layers, and blocks of log-probabilities."""
        blocks = -(-(self.num_tokens - 1) // logprobs_block(self.bucket))
        return self.num_layer_chunks + blocks * self.wants_logprobs

    def work(self, model: ModelConfig) -> np.ndarray:
        """Multiply-adds of every chunk: of a layer's weights, and of its attention."""
        heads = model.num_heads * model.head_dim
        weights = 2 * model.hidden_size * heads * (1 + 1 / model.group_size)
        weights += 3 * model.hidden_size * model.intermediate_size
        per_layer = self.num_layer_chunks // self.num_layers
        past = (np.arange(self.num_layer_chunks) % per_layer + 0.5) * self.chunk_size
        logits = logprobs_block(self.bucket) * model.hidden_size * model.vocab_size
        logprobs = np.full(self.num_chunks - self.num_layer_chunks, float(logits))
        return np.concatenate([self.chunk_size * (weights + 2 * heads * past), logprobs])


def chunk_size_of(bucket: int, config: EngineConfig) -> int:
    """Tokens of a chunk of prompts of that bucket."""
    return min(config.prefill_chunk_size, bucket)


def prefill_bucket(num_tokens: int, config: EngineConfig) -> int:
    """The compiled prompt length that holds `num_tokens`.

    Up to a chunk, buckets double, since padding is computed like a prompt. Beyond, only whole
    chunks of padding are added, which are not computed: fewer sizes need to be compiled.
    """
    bucket = MIN_PREFILL_BUCKET
    while bucket < num_tokens:
        bucket *= 2 if bucket < config.prefill_chunk_size else 4
    return min(bucket, config.max_model_len)


def logprobs_block(bucket: int) -> int:
    """Prompt tokens of a bucket whose log-probabilities are computed at a time."""
    return min(_LOGPROBS_BLOCK, bucket)
