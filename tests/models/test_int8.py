"""Weights in int8: the logits of the oracle with its weights rounded alike, in half the bytes."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from fairkv_jax.checkpoint import Checkpoint, open_checkpoint
from fairkv_jax.compress import make_policy
from fairkv_jax.config import KVConfig
from fairkv_jax.models import Llama
from fairkv_jax.plan import Profile, make_plan
from fairkv_jax.prefill import prefill
from fairkv_jax.sharding.mesh import make_mesh
from fairkv_jax.sharding.place import load_model
from fairkv_jax.sharding.slots import SlotLayout
from tests.oracle.forward import forward, read_llama
from tests.oracle.tiny import write_tiny_checkpoint

PROMPT = [5, 40, 7, 7, 300, 12, 99, 1, 250, 33, 18, 5, 40, 8, 200, 61]
NUM_DEVICES = 2


def load(checkpoint: Checkpoint, dtype: str, quantization: str | None) -> tuple[Llama, SlotLayout]:
    config = checkpoint.config
    profile = Profile.uniform(config.num_layers, config.num_kv_heads, 64)
    layout = SlotLayout.from_plan(make_plan(profile, NUM_DEVICES, "fair_copying"))
    mesh = make_mesh(NUM_DEVICES)
    model = load_model(checkpoint, layout, mesh, dtype, quantization=quantization, progress=False)
    return model, layout


def logits(model: Llama, layout: SlotLayout, prompt: list[int]) -> np.ndarray:
    length = np.int32(len(prompt))
    prefix = prefill(
        model,
        np.array(prompt, np.int32),
        length,
        length,
        layout.slot_head,
        layout.first_slot,
        mesh=make_mesh(NUM_DEVICES),
        policy=make_policy(KVConfig()),
        packed_size=len(prompt) * layout.num_heads,
    )
    return np.asarray(prefix.logits, np.float64)


def num_bytes(model: Llama) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(model))


def rounded(matrix: np.ndarray) -> np.ndarray:
    """A published [out, in] matrix with every row in 255 steps up to its largest magnitude."""
    steps = np.abs(matrix).max(1, keepdims=True) / np.float32(127)
    return np.rint(matrix / steps) * steps


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_logits_are_those_of_rounded_weights(tmp_path: Path, architecture: str, tie: bool):
    path = write_tiny_checkpoint(
        tmp_path / "tiny.gguf", architecture=architecture, tie_word_embeddings=tie
    )
    exact = read_llama(path)
    weights = {n: rounded(w) if w.ndim == 2 else w for n, w in exact.weights.items()}
    expected = forward(dataclasses.replace(exact, weights=weights), PROMPT).logits
    actual = logits(*load(open_checkpoint(path), "float32", "int8"), PROMPT)
    np.testing.assert_allclose(actual, expected, atol=2e-3)
    assert np.abs(forward(exact, PROMPT).logits - expected).max() > 0.02
