"""Gemma: what its files hold, its formulas in low precision, and the engine's invariants."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from fairkv_jax import LLM, SamplingParams
from fairkv_jax.checkpoint import open_checkpoint
from fairkv_jax.plan import Profile, make_plan
from fairkv_jax.sharding.load_weights import load_model, partition_specs
from fairkv_jax.sharding.mesh import make_mesh
from fairkv_jax.sharding.slots import SlotLayout
from tests.oracle.forward import forward, read_llama
from tests.oracle.tiny import write_tiny_checkpoint
from tests.oracle.tiny_hf import write_tiny_folder

PROMPT = [5, 40, 7, 7, 300, 12, 99, 1, 250, 33, 18, 8, 200, 61, 77, 3, 140, 9, 22, 310]
NUM_TOKENS = 8


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> Path:
    """Three KV heads with two query heads each, of 256 dimensions like the published models."""
    path = tmp_path_factory.mktemp("gemma") / "tiny.gguf"
    return write_tiny_checkpoint(path, architecture="gemma", head_dim=256)


@pytest.fixture(scope="module")
def folder(gguf, tmp_path_factory) -> Path:
    changes = {
        "architectures": ["GemmaForCausalLM"],
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_act": "gelu_pytorch_tanh",
    }
    return write_tiny_folder(tmp_path_factory.mktemp("hf"), gguf, changes=changes)


@pytest.fixture(scope="module")
def expected(gguf) -> list[int]:
    """The oracle's greedy tokens."""
    model, tokens = read_llama(gguf), list(PROMPT)
    for _ in range(NUM_TOKENS):
        tokens.append(int(forward(model, tokens).logits.argmax()))
    return tokens[len(PROMPT) :]


def greedy(path: Path, num_devices: int, **options: Any) -> list[int]:
    llm = LLM(
        model=path,
        tensor_parallel_size=num_devices,
        max_model_len=64,
        max_num_seqs=1,
        kv_cache_memory_bytes=1 << 23,
        progress=False,
        **options,
    )
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    return list(llm.generate([PROMPT], params)[0].outputs[0].token_ids)


@pytest.mark.parametrize(
    ("num_devices", "head_plan"), [(1, "static"), (2, "fair_copying"), (3, "best_effort")]
)
def test_greedy_tokens_are_the_same_on_every_mesh(gguf, expected, num_devices, head_plan):
    assert len(set(expected)) > 2
    assert greedy(gguf, num_devices, head_plan=head_plan) == expected


def test_a_budget_as_large_as_the_prompt_is_dense_attention(folder, expected):
    options = {"kv_policy": "ada_snapkv", "kv_window": 4, "head_plan": "fair_copying"}
    assert greedy(folder, 2, kv_budget=len(PROMPT), **options) == expected


def test_norms_are_the_published_weights_in_either_format(gguf, folder):
    one, other = open_checkpoint(gguf), open_checkpoint(folder)
    assert one.config == other.config
    published = read_llama(gguf).weights
    for name, oracle_name in (
        ("norm", "norm"),
        ("layers.1.attn_norm", "layers.1.input_layernorm"),
        ("layers.0.mlp_norm", "layers.0.post_attention_layernorm"),
    ):
        assert abs(published[oracle_name].mean()) < 0.1  # not 1 + w
        np.testing.assert_array_equal(one.tensor(name), published[oracle_name])
        np.testing.assert_array_equal(other.tensor(name), published[oracle_name])


def test_embeddings_are_scaled_in_the_models_type(gguf):
    """The factor is rounded to bfloat16, then the product is: sqrt(48) = 6.928 becomes 6.9375."""
    checkpoint = open_checkpoint(gguf)
    plan = make_plan(Profile.uniform(2, 3, 1), 2, "static")
    mesh = make_mesh(2)
    model = load_model(checkpoint, SlotLayout.from_plan(plan), mesh, "bfloat16", progress=False)
    whole = PartitionSpec()
    embedded = jax.shard_map(
        lambda model, tokens: model.embedded(tokens),
        mesh=mesh,
        in_specs=(partition_specs(model), whole),
        out_specs=whole,
        check_vma=False,
    )
    got = jax.jit(embedded)(model, jnp.array(PROMPT))
    rows = checkpoint.tensor("embed")[PROMPT].astype(ml_dtypes.bfloat16).astype(np.float32)
    want = (rows * np.float32(6.9375)).astype(ml_dtypes.bfloat16)
    assert np.any(want != (rows * np.float32(np.sqrt(48))).astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(np.asarray(got), want)
