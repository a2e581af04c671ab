"""Costs from hardware and shapes, and costs fitted to measured steps."""

import numpy as np
import pytest

from fairkv_jax.plan import (
    HARDWARE,
    SHAPES,
    CostModel,
    ModelShape,
    Profile,
    Step,
    calibrate,
    default_cost,
    find_shape,
    make_plan,
)


def test_a_and_b_are_bytes_over_bandwidth():
    """Llama-3.3-70B: one head's weights are as many bytes as 72 rows of 1,024 cached tokens."""
    cost = CostModel.of(SHAPES["llama-3.3-70b"], 8, "H100", batch=16)
    # q and o: 8 query heads of 128 each; k and v: one head each; all to and from 8,192; bfloat16.
    assert cost.head_bytes == (2 * 8 + 2) * 128 * 8192 * 2
    assert cost.token_bytes == 2 * 128 * 2
    assert cost.a_seconds == pytest.approx(cost.head_bytes / 3.35e12)
    assert cost.head_bytes / cost.token_bytes / 1024 == 72


def test_an_int8_cache_costs_a_byte_per_element_and_two_scales():
    shape = SHAPES["llama-3.3-70b"]
    bfloat16 = CostModel.of(shape, 8, "H100", batch=16)
    int8 = CostModel.of(shape, 8, "H100", batch=16, kv_cache_dtype="int8")
    assert int8.token_bytes == 2 * (128 + 2)
    assert int8.b_seconds_per_token == pytest.approx(int8.token_bytes / 3.35e12)
    assert (int8.a_seconds, int8.rest_bytes) == (bfloat16.a_seconds, bfloat16.rest_bytes)
    unknown = Profile.uniform(32, 8, 64)
    costs = [default_cost(unknown, 2, batch=1, kv_cache_dtype=d) for d in ("auto", "int8")]
    assert [cost.token_bytes for cost in costs] == [2 * 128 * 2, 2 * (128 + 2)]


@pytest.mark.parametrize("hardware", HARDWARE)
def test_presets_hold_the_whole_70b_model_apart_from_norms_and_embeddings(hardware):
    shape = SHAPES["llama-3.3-70b"]
    cost = CostModel.of(shape, 8, hardware, batch=16)
    weights = cost.rest_bytes * 8 + shape.num_layers * shape.num_kv_heads * cost.head_bytes
    assert weights / 2 == pytest.approx(70.55e9 - 128256 * 8192, rel=0.01)


def test_shapes_are_found_by_name():
    assert find_shape("meta-llama/Llama-3.3-70B-Instruct") == SHAPES["llama-3.3-70b"]
    assert find_shape("Meta-Llama-3-8B-Instruct") == SHAPES["llama-3-8b"]
    assert find_shape("another") is None


def test_the_default_batch_is_what_memory_holds():
    shape = SHAPES["llama-3.1-8b"]
    profile = Profile("m", "full", None, ((32768.0,) * 8,) * 32, shape=shape)
    cost = default_cost(profile, 2, "H100")
    memory = 0.9 * HARDWARE["H100"].memory_bytes
    used = cost.rest_bytes + 32 * 4 * cost.head_bytes
    row_bytes = 32 * 4 * 32768 * cost.token_bytes
    assert used + cost.batch * row_bytes <= memory < used + (cost.batch + 1) * row_bytes
    assert default_cost(Profile.uniform(32, 8, 64), 2).batch == 256
    assert default_cost(Profile.uniform(32, 8, 1e9), 2).batch == 1
    assert default_cost(profile, 2, batch=7) == CostModel.of(shape, 2, batch=7)
    assert make_plan(profile, 2).cost.batch == cost.batch


def test_bad_costs_are_named():
    with pytest.raises(ValueError, match="a_seconds must be a number of at least 0"):
        CostModel(-1.0, 1.0, batch=1)
    with pytest.raises(ValueError, match="batch must be an integer of at least 1"):
        CostModel(1.0, 1.0, batch=0)
    with pytest.raises(ValueError, match="b_seconds_per_token must be positive"):
        CostModel(1.0, 0.0, batch=1)
    with pytest.raises(ValueError, match="hardware must be one of"):
        CostModel.of(SHAPES["llama-3-8b"], 2, "TPU", batch=1)
    with pytest.raises(ValueError, match="9 query heads do not divide over 2 KV heads"):
        ModelShape(1, 8, 9, 2, 4, 8, 8)


def _steps(noise: float) -> list[Step]:
    rng = np.random.default_rng(0)
    return [
        Step(slots, tokens, (2e-3 + 3e-5 * slots + 5e-9 * tokens) * (1 + noise * rng.normal()))
        for slots in (30, 60, 90)
        for tokens in (1e4, 1e5, 1e6)
    ]


def test_calibration_finds_the_costs_that_made_the_steps():
    start = CostModel.of(SHAPES["smollm2-135m"], 2, "CPU", batch=8)
    exact = calibrate(_steps(0.0), start)
    assert exact.cost.a_seconds == pytest.approx(3e-5)
    assert exact.cost.b_seconds_per_token == pytest.approx(5e-9)
    assert exact.cost.rest_seconds == pytest.approx(2e-3)
    assert exact.relative_error < 1e-9
    assert (exact.cost.batch, exact.cost.token_bytes) == (8, start.token_bytes)
    noisy = calibrate(_steps(0.02), start)
    assert noisy.cost.a_seconds == pytest.approx(3e-5, rel=0.15)
    assert 0.005 < noisy.relative_error < 0.05


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([], "at least 3 steps"),
        ([Step(30, 1e4, 1.0)] * 4, "do not determine"),
        ([Step(30, 1e4, 1.0), Step(30, 2e4, 1.5), Step(30, 3e4, 2.0)], "do not determine"),
        ([Step(30, 1e4, 3.0), Step(30, 2e4, 2.0), Step(60, 3e4, 1.0)], "do not increase with"),
    ],
)
def test_steps_that_tell_nothing_are_refused(steps, message):
    with pytest.raises(ValueError, match=message):
        calibrate(steps, CostModel(1.0, 1.0, batch=1))
