"""The profile that lies beside the weights decides where heads go."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from fairkv_jax.checkpoint import open_checkpoint
from fairkv_jax.checkpoint.convert import convert
from fairkv_jax.engine.build import build_engine
from fairkv_jax.plan import Plan, Profile

PROFILE = replace(
    Profile.uniform(2, 3, 16.0), policy="snapkv", tokens=((4.0, 4.0, 40.0), (40.0, 4.0, 4.0))
)


@pytest.fixture
def gguf(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    (tmp_path / "profile.json").write_text(PROFILE.to_json())
    return Path(shutil.copy(tiny_checkpoint, tmp_path))


def plan(path: Path, kv_policy: str = "snapkv") -> Plan:
    engine = build_engine(
        path,
        tensor_parallel_size=2,
        head_plan="best_effort",
        kv_policy=kv_policy,
        kv_budget=None if kv_policy == "full" else 32,
        max_model_len=64,
        kv_cache_memory_bytes=1 << 22,
        progress=False,
    )
    return engine.plan


def test_a_converted_checkpoint_brings_its_profile(gguf: Path, tmp_path: Path):
    converted = convert(open_checkpoint(gguf), tmp_path / "converted")
    copies = plan(converted).replicas()
    # The heavy head of each layer is alone on its device.
    assert [layer.sum(0).min() for layer in copies] == [1, 1]
    for layer, heavy in enumerate((2, 0)):
        assert copies[layer][:, copies[layer][heavy].argmax()].sum() == 1


def test_of_another_policy_it_is_left_aside(gguf: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        plan(gguf, "full")
    assert "was measured with the policy snapkv, not full" in caplog.text


def test_of_another_model_it_is_an_error(gguf: Path):
    (gguf.parent / "profile.json").write_text(Profile.uniform(3, 3, 16.0).to_json())
    with pytest.raises(ValueError, match="has 3 layers x 3 KV heads, but the model has 2 x 3"):
        plan(gguf)
