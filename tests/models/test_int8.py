"""Weights in int8: the logits of the oracle with its weights rounded alike."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from fairkv_jax import LLM
from tests.oracle.forward import forward, read_llama
from tests.oracle.tiny import write_tiny_checkpoint

PROMPT = [5, 40, 7, 7, 300, 12, 99, 1, 250, 33, 18, 5, 40, 8, 200, 61]


def rounded(matrix: np.ndarray) -> np.ndarray:
    """A published [out, in] matrix with every row in 255 steps up to its largest magnitude."""
    steps = np.abs(matrix).max(1, keepdims=True) / np.float32(127)
    return np.rint(matrix / steps) * steps


@pytest.mark.parametrize(
    ("architecture", "tie"), [("qwen2", True), ("qwen3", False), ("gemma", True)]
)
def test_logits_are_those_of_rounded_weights(tmp_path: Path, architecture: str, tie: bool):
    path = write_tiny_checkpoint(
        tmp_path / "tiny.gguf", architecture=architecture, tie_word_embeddings=tie
    )
    exact = read_llama(path)
    weights = {n: rounded(w) if w.ndim == 2 else w for n, w in exact.weights.items()}
    expected = forward(dataclasses.replace(exact, weights=weights), PROMPT).logits
    llm = LLM(
        model=path,
        quantization="int8",
        tensor_parallel_size=2,
        max_model_len=32,
        kv_cache_memory_bytes=1 << 22,
        progress=False,
    )
    np.testing.assert_allclose(llm.prefill_logits(PROMPT), expected, atol=2e-3)
    assert np.abs(forward(exact, PROMPT).logits - expected).max() > 0.02
