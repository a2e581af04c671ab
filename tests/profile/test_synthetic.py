"""Drawn profiles keep the budget and have the imbalance that was asked for."""

import pytest

from fairkv_jax.plan import SHAPES
from fairkv_jax.profile import synthetic_profile


@pytest.mark.parametrize("imbalance", [0.0, 0.25, 0.6])
@pytest.mark.parametrize("model", ["llama-3-8b", "llama-3.3-70b", "mistral-small-24b"])
def test_budget_and_imbalance_are_met(model, imbalance):
    shape = SHAPES[model]
    profile = synthetic_profile(shape, 1024, model=model, imbalance=imbalance)
    tokens = profile.array
    assert tokens.shape == (shape.num_layers, shape.num_kv_heads)
    assert tokens.mean(1) == pytest.approx(1024)
    assert tokens.min() >= 32 + 0.2 * (1024 - 32) - 1e-9
    assert (tokens.std(1) / tokens.mean(1)).mean() == pytest.approx(imbalance, rel=0.2, abs=1e-6)


def test_seeds_decide():
    shape = SHAPES["llama-3-8b"]
    first, again, other = (synthetic_profile(shape, 256, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.tokens != other.tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 32}, "budget 32 must be larger than the window 32"),
        ({"budget": 64, "imbalance": -1}, "imbalance must be at least 0"),
        ({"budget": 64, "imbalance": float("nan")}, "imbalance must be at least 0"),
        ({"budget": 64, "alpha": 2}, "alpha must be in"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        synthetic_profile(SHAPES["llama-3-8b"], **options)
