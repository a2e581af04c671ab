"""How the work of a prefill is divided into chunks; plain arithmetic that host and devices share.

A chunk is a block of prompt tokens in one layer. Chunks are counted layer by layer. After those of
the prompt follow those of its repetitions, where the method lets the model repeat it, and blocks of
the prompt's own log-probabilities, if requested:

    layer 0: 0, 1, .. | layer 1: n, n + 1, .. | ... | repetitions | log-probabilities
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from fairkv_jax.compress.budgets import budgets_per_head
from fairkv_jax.compress.instruction import RepeatInstruction
from fairkv_jax.config import EngineConfig, KVConfig, ModelConfig

MIN_PREFILL_BUCKET = 32
_MAX_PACKED_PROMPTS = 16
_MAX_PACKED_CHUNKS = 2
"""Chunks of each layer that packed prompts take at most: more would delay the first of them."""
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
    repetitions: tuple[int, ...] = ()
    """Tokens of each repetition of a part of the prompt."""

    @classmethod
    def of(
        cls,
        num_tokens: int,
        model: ModelConfig,
        config: EngineConfig,
        *,
        wants_logprobs: bool,
        repetitions: tuple[int, ...] = (),
    ) -> "PrefillChunking":
        """The chunks of a prompt of `num_tokens`."""
        bucket = prefill_bucket(num_tokens, config)
        chunk_size = chunk_size_of(bucket, config)
        return cls(num_tokens, bucket, chunk_size, model.num_layers, wants_logprobs, repetitions)

    @property
    def num_layer_chunks(self) -> int:
        """Chunks of the prompt in all layers."""
        return self._layer_chunks(self.num_tokens)

    @property
    def num_cache_chunks(self) -> int:
        """Chunks of the prompt and of its repetitions: after these its cache is complete."""
        return self.num_layer_chunks + sum(map(self._layer_chunks, self.repetitions))

    @property
    def num_chunks(self) -> int:
        """All chunks, and blocks of log-probabilities."""
        blocks = -(-(self.num_tokens - 1) // logprobs_block(self.bucket))
        return self.num_cache_chunks + blocks * self.wants_logprobs

    def repetition_calls(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Lists the parts of the chunks [start, stop) that belong to repetitions.

        Yields the index of a repetition, and the first of its chunks and the one behind the last,
        counted from its own start.
        """
        begin = self.num_layer_chunks
        for index, num_tokens in enumerate(self.repetitions):
            end = begin + self._layer_chunks(num_tokens)
            if start < end and begin < stop:
                yield index, max(start, begin) - begin, min(stop, end) - begin
            begin = end

    def work(self, model: ModelConfig) -> np.ndarray:
        """Multiply-adds of every chunk: of a layer's weights, and of its attention."""
        heads = model.num_heads * model.head_dim
        weights = 2 * model.hidden_size * heads * (1 + 1 / model.group_size)
        weights += 3 * model.hidden_size * model.intermediate_size
        logits = logprobs_block(self.bucket) * model.hidden_size * model.vocab_size
        passes = [(0, self.num_tokens), *((self.num_tokens, each) for each in self.repetitions)]
        work = []
        for num_before, num_tokens in passes:
            chunks = np.tile(np.arange(self._per_layer(num_tokens)), self.num_layers)
            past = num_before + (chunks + 0.5) * self.chunk_size
            work.append(self.chunk_size * (weights + 2 * heads * past))
        work.append(np.full(self.num_chunks - self.num_cache_chunks, float(logits)))
        return np.concatenate(work)

    def _per_layer(self, num_tokens: int) -> int:
        return -(-num_tokens // self.chunk_size)

    def _layer_chunks(self, num_tokens: int) -> int:
        return self.num_layers * self._per_layer(num_tokens)


def repetitions_of(
    num_tokens: int,
    model: ModelConfig,
    kv_config: KVConfig,
    instruction: RepeatInstruction | None,
) -> tuple[int, ...]:
    """Returns the tokens of each repetition of a prompt: none where it is kept whole."""
    if instruction is None or not kv_config.repeats_prompt:
        return ()
    budgets = budgets_per_head(kv_config, num_tokens, model.num_layers, model.num_kv_heads)
    if min(map(min, budgets)) >= num_tokens:
        return ()
    return instruction.part_lengths(num_tokens)


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


@dataclass(frozen=True)
class Packing:
    """Which short prompts are packed: prefilled one behind the other, in the same chunks.

    Together they are no longer than a prompt that the engine keeps whole.
    """

    max_tokens: int
    max_prompts: int
    work: Callable[[int], np.ndarray]
    """Multiply-adds of every chunk, by the number of tokens."""

    @classmethod
    def of(cls, model: ModelConfig, config: EngineConfig, kv_config: KVConfig) -> "Packing":
        """What an engine packs."""
        most = min(_MAX_PACKED_CHUNKS * config.prefill_chunk_size, config.max_model_len)
        heads = model.num_layers, model.num_kv_heads

        def is_whole(num_tokens: int) -> bool:
            return min(map(min, budgets_per_head(kv_config, num_tokens, *heads))) >= num_tokens

        def work(num_tokens: int) -> np.ndarray:
            return PrefillChunking.of(num_tokens, model, config, wants_logprobs=False).work(model)

        # Shorter prompts than one that is kept whole are kept whole too.
        max_tokens = bisect_left(range(1, most + 1), True, key=lambda n: not is_whole(n))
        return cls(max_tokens, min(_MAX_PACKED_PROMPTS, config.max_num_seqs), work)


def logprobs_block(bucket: int) -> int:
    """Prompt tokens of a bucket whose log-probabilities are computed at a time."""
    return min(_LOGPROBS_BLOCK, bucket)
