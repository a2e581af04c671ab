"""From options to an engine: defaults that depend on the devices, and deprecated names."""

from pathlib import Path
from typing import Any

import jax
import pytest

from fairkv_jax.engine import build, head_plan
from fairkv_jax.engine.build import build_engine, default_max_num_seqs
from fairkv_jax.engine.llm import LLM

ROOMY = 1 << 30
OPTIONS: dict[str, Any] = {
    "max_model_len": 64,
    "kv_policy": "ada_snapkv",
    "kv_budget": 32,
    "progress": False,
}


@pytest.mark.parametrize(
    ("platform", "slots", "pool_tokens", "rows"),
    [
        ("cpu", 1, ROOMY, 8),
        ("cpu", 4096, 16, 8),
        ("gpu", 1, ROOMY, 256),
        ("gpu", 32, ROOMY, 256),  # 8192 pairs, the most that compile
        ("gpu", 33, ROOMY, 248),
        ("gpu", 8, 64 * 512, 64),
        ("gpu", 8, 64 * 512 - 1, 63),
        ("gpu", 8, 16, 1),
        ("gpu", 10_000, ROOMY, 1),
    ],
)
def test_default_rows(platform: str, slots: int, pool_tokens: int, rows: int):
    assert default_max_num_seqs(platform, slots, pool_tokens, max_model_len=8192) == rows


def test_short_contexts_need_less_of_the_pool_per_row():
    assert default_max_num_seqs("gpu", 8, 64 * 512, max_model_len=128) == 256


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Collects what engines would be made from; none is loaded."""
    made: list[tuple[Any, ...]] = []

    def record(checkpoint: Any, plan: Any, engine_config: Any, kv_config: Any, **_: Any) -> None:
        made.append((plan, engine_config, kv_config))

    monkeypatch.setattr(build, "LLMEngine", record)
    return made


def test_rows_on_cpu_and_on_gpus(
    tiny_checkpoint: Path, built: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
):
    build_engine(tiny_checkpoint, **OPTIONS)
    build_engine(tiny_checkpoint, max_num_seqs=3, **OPTIONS)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    build_engine(tiny_checkpoint, **OPTIONS)
    build_engine(tiny_checkpoint, max_num_seqs=300, **OPTIONS)
    configs = [engine_config for _, engine_config, _ in built]
    assert [config.max_num_seqs for config in configs] == [8, 3, 256, 300]
    assert [config.dtype for config in configs] == ["float32"] * 2 + ["bfloat16"] * 2
    assert [config.prefill_chunk_size for config in configs] == [128, 128, 1024, 1024]


def test_a_small_pool_lowers_the_rows_and_the_plan_follows(
    tiny_checkpoint: Path, built: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    batches = []
    original = head_plan.CostModel.of

    def record(*args: Any, batch: int, **options: Any) -> Any:
        batches.append(batch)
        return original(*args, batch=batch, **options)

    monkeypatch.setattr(head_plan.CostModel, "of", record)
    build_engine(tiny_checkpoint, kv_cache_memory_bytes=1 << 20, **OPTIONS)
    ((_, config, _),) = built
    assert config.max_num_seqs < 256
    assert batches == [256, config.max_num_seqs]
    assert config.kv_cache_bytes == 1 << 20


@pytest.mark.parametrize(
    ("old", "new", "value"),
    [
        ("kv_pool", "kv_pooling", "avg"),
        ("kv_floor", "kv_safeguard", "reserve"),
        ("kv_alpha", "kv_alpha_safeguard", 0.5),
        ("prefill_block", "prefill_chunk_size", 64),
        ("max_copies", "max_extra_replicas", 0),
    ],
)
@pytest.mark.parametrize("make", [LLM, build_engine])
def test_deprecated_names(
    make: Any, old: str, new: str, value: Any, tiny_checkpoint: Path, built: list[Any]
):
    options = OPTIONS | {"tensor_parallel_size": 2}
    with pytest.warns(DeprecationWarning, match=f"{old} is deprecated .*: use {new}") as caught:
        make(tiny_checkpoint, **options, **{old: value})
    assert [each.filename for each in caught] == [__file__]
    make(tiny_checkpoint, **options, **{new: value})
    make(tiny_checkpoint, **options)
    assert built[0] == built[1] != built[2]
    with pytest.raises(ValueError, match=f"{old} is the deprecated name of {new}"):
        make(tiny_checkpoint, **options, **{old: value, new: value})


def test_unknown_options_name_the_nearest_one(tiny_checkpoint: Path):
    with pytest.raises(TypeError, match="unknown option 'kv_bugdet': did you mean 'kv_budget'"):
        build_engine(tiny_checkpoint, kv_bugdet=64)
