"""The kernels inside the engine: on a mesh of CPU devices, where they are interpreted."""

from pathlib import Path

import pytest

from fairkv_jax import LLM, SamplingParams

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6] * 5, [2, 7, 1, 8] * 4]


def generate(checkpoint: Path, backend: str) -> list[list[int]]:
    llm = LLM(
        model=str(checkpoint),
        tensor_parallel_size=2,
        max_model_len=64,
        max_num_seqs=2,
        kv_policy="ada_snapkv",
        kv_budget=20,
        kv_window=8,
        attention_backend=backend,
        progress=False,
    )
    outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    return [output.outputs[0].token_ids for output in outputs]


def test_the_kernels_generate_the_same_tokens(tiny_checkpoint: Path) -> None:
    expected = generate(tiny_checkpoint, "reference")
    assert [len(tokens) for tokens in expected] == [20, 20]
    assert generate(tiny_checkpoint, "triton") == expected


def test_an_unknown_backend_is_refused_before_loading() -> None:
    with pytest.raises(ValueError, match="attention_backend must be one of"):
        LLM(model="no such checkpoint", attention_backend="cuda", progress=False)
