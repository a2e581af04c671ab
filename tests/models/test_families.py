"""Every family, from GGUF files and from published folders, against the oracle's forward pass."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from fairkv_jax.checkpoint import open_checkpoint
from fairkv_jax.config import EngineConfig, KVConfig
from fairkv_jax.engine.model_runner import ModelRunner
from fairkv_jax.plan import Profile, make_plan
from tests.oracle.forward import Llama, forward, read_llama, silu
from tests.oracle.tiny import write_tiny_checkpoint
from tests.oracle.tiny_hf import write_tiny_folder

PROMPT = [5, 40, 7, 7, 300, 12, 99, 1, 250, 33, 18, 5, 40, 8, 200, 61, 77, 3, 140, 9] * 2
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Case:
    """A family's tiny model: options of the GGUF writer, and changed values of config.json."""

    gguf: dict[str, Any]
    hf: dict[str, Any]
    loses: Callable[[str], bool] = lambda name: False
    """Whether a weight, if it were missing, would leave a plain Llama."""
    expected: dict[str, Any] = field(default_factory=dict)


FAMILIES = {
    "llama2": Case({"tie_word_embeddings": False}, {}),
    "llama3": Case(
        {"rope_scaling": LLAMA3, "rope_theta": 500.0},
        {"rope_scaling": LLAMA3 | {"rope_type": "llama3"}},
    ),
    "mistral": Case(
        # head_dim is not hidden_size / num_heads: 24, not 48 / 6.
        {"head_dim": 24, "tie_word_embeddings": False},
        {"architectures": ["MistralForCausalLM"], "sliding_window": None},
        expected={"architecture": "mistral"},
    ),
    "qwen2": Case(
        {"architecture": "qwen2"},
        {
            "architectures": ["Qwen2ForCausalLM"],
            "attention_bias": None,
            "use_sliding_window": False,
            "sliding_window": 8,
        },
        lambda name: name.endswith(".bias"),
    ),
    "qwen3": Case(
        {"architecture": "qwen3", "head_dim": 32, "tie_word_embeddings": False},
        {"architectures": ["Qwen3ForCausalLM"]},
        lambda name: name.endswith(("q_norm", "k_norm")),
    ),
    "gemma": Case(
        {"architecture": "gemma", "head_dim": 256, "num_heads": 3, "num_kv_heads": 1},
        {
            "architectures": ["GemmaForCausalLM"],
            "hidden_act": "gelu",
            "hidden_activation": None,
        },
    ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def case(request) -> Case:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def gguf(case, tmp_path_factory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("gguf") / "tiny.gguf", **case.gguf)


@pytest.fixture(scope="module")
def folder(case, gguf, tmp_path_factory) -> Path:
    return write_tiny_folder(tmp_path_factory.mktemp("hf"), gguf, changes=case.hf)


def make_engine(path: Path, num_devices: int = 2) -> ModelRunner:
    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    profile = Profile.uniform(config.num_layers, config.num_kv_heads, 64)
    plan = make_plan(profile, num_devices, "fair_copying")
    sizes = EngineConfig(
        tensor_parallel_size=num_devices, max_model_len=64, kv_cache_bytes=1 << 22, max_num_seqs=1
    )
    return ModelRunner(checkpoint, plan, sizes, KVConfig(), progress=False)


def test_the_logits_are_those_of_the_formulas_from_either_format(case, gguf, folder):
    from_gguf, from_folder = make_engine(gguf), make_engine(folder)
    config = dataclasses.replace(from_gguf.model_config, **case.expected)
    assert from_folder.model_config == config
    for one, other in zip(*map(jax.tree.leaves, (from_gguf.model, from_folder.model)), strict=True):
        np.testing.assert_array_equal(one, other)
    expected = forward(read_llama(gguf), PROMPT).logits
    logits = np.asarray(from_folder.prefill(PROMPT).logits)
    np.testing.assert_allclose(logits, expected, atol=2e-4)


def variants(model: Llama, case: Case) -> dict[str, Llama]:
    """Models that a wrong reader would make of the same files."""
    weights, heads = model.weights, model.num_heads

    def changed(change: Callable[[str, np.ndarray], np.ndarray]) -> Llama:
        return dataclasses.replace(model, weights={n: change(n, w) for n, w in weights.items()})

    def interleaved(name: str, weight: np.ndarray) -> np.ndarray:
        if not name.endswith(("q_proj", "k_proj")):
            return weight
        halves = weight.reshape(-1, 2, model.head_dim // 2, weight.shape[1])
        return halves.swapaxes(1, 2).reshape(weight.shape)

    def regrouped(name: str, weight: np.ndarray) -> np.ndarray:
        """Query heads dealt out to the KV heads in turn, instead of in runs."""
        if not name.endswith("q_proj"):
            return weight
        groups = weight.reshape(model.num_kv_heads, -1, model.head_dim, weight.shape[1])
        return groups.swapaxes(0, 1).reshape(weight.shape)

    def plain(name: str, weight: np.ndarray) -> np.ndarray:
        if not case.loses(name):
            return weight
        return np.zeros_like(weight) if name.endswith(".bias") else np.ones_like(weight)

    assert heads > model.num_kv_heads
    wrong = {"interleaved": changed(interleaved)}
    if model.num_kv_heads > 1:
        wrong["regrouped"] = changed(regrouped)
    if model.norm_offset:
        wrong["no offset"] = dataclasses.replace(model, norm_offset=0.0)
        wrong["SwiGLU"] = dataclasses.replace(model, activation=silu)
        wrong["embeddings not scaled"] = dataclasses.replace(model, embedding_scale=1.0)
    if any(map(case.loses, weights)):
        wrong["plain"] = changed(plain)
    if model.rope_divisors is not None:
        wrong["not stretched"] = dataclasses.replace(model, rope_divisors=None)
        wrong["stretched alike"] = dataclasses.replace(model, rope_divisors=np.full(8, 8.0))
    return wrong


def test_what_a_wrong_reader_would_make_differs_clearly(case, gguf):
    model = read_llama(gguf)
    expected = forward(model, PROMPT).logits
    for name, wrong in variants(model, case).items():
        difference = np.abs(forward(wrong, PROMPT).logits - expected).max()
        assert difference > 0.1, name
