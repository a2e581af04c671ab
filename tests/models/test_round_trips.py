"""Greedy tokens are the same whatever the format, the mesh and the plan."""

from pathlib import Path
from typing import Any

import pytest

from fairkv_jax import LLM, SamplingParams
from fairkv_jax.checkpoint import open_checkpoint
from fairkv_jax.checkpoint.convert import convert
from tests.oracle.tiny import write_tiny_checkpoint
from tests.oracle.tiny_hf import write_tiny_folder

PROMPTS = [[5, 40, 7, 7, 300, 12, 99, 1], [250, 33, 18]]


def greedy(path: Path, num_devices: int, head_plan: str) -> list[list[int]]:
    llm = LLM(
        model=path,
        tensor_parallel_size=num_devices,
        head_plan=head_plan,
        max_model_len=64,
        max_num_seqs=2,
        kv_cache_memory_bytes=1 << 22,
        progress=False,
    )
    outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("source", [pytest.param("gguf", marks=pytest.mark.long), "folder"])
def test_converted_on_another_mesh_and_plan(tmp_path, source):
    options: dict[str, Any] = {"architecture": "qwen2"}
    if source == "folder":
        options = {"tie_word_embeddings": False}
    path = write_tiny_checkpoint(tmp_path / "tiny.gguf", **options)
    if source == "folder":
        path = write_tiny_folder(tmp_path / "hf", path, num_parts=2)
    expected = greedy(path, 1, "static")
    assert len(set(expected[0])) > 2
    converted = convert(open_checkpoint(path), tmp_path / "converted")
    assert greedy(converted, 2, "fair_copying") == expected
