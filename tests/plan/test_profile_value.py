"""The profile as a value and as a file."""

import json
from dataclasses import replace

import numpy as np
import pytest

from fairkv_jax.plan import SHAPES, Profile, find_shape, shipped_profile

GOOD = {"model": "m", "policy": "ada_snapkv", "budget": 64, "tokens": [[1.0, 2.0], [3.0, 4.5]]}


def test_json_gives_the_profile_back():
    samples = np.random.default_rng(0).integers(1, 9, size=(4, 30, 3))
    profile = Profile.from_samples(
        samples, model="m", policy="snapkv", budget=8, shape=SHAPES["smollm2-135m"],
        held_out=(("static", 0.5), ("best_effort", 0.75)), prompt_tokens=7.5, source="test",
    )  # fmt: skip
    again = Profile.from_json(profile.to_json())
    assert again == profile
    assert hash(again) == hash(profile)
    assert np.allclose(again.array, samples.mean(0))


def test_the_agreed_fields_alone_are_enough():
    profile = Profile.from_json(json.dumps(GOOD))
    assert profile.array.tolist() == GOOD["tokens"]
    assert Profile.from_json(json.dumps(GOOD | {"budget": None})).budget is None


def test_correlation_is_the_mean_over_pairs_of_prompts():
    samples = np.random.default_rng(1).gamma(2, size=(5, 4, 3))
    profile = Profile.from_samples(samples, model="m", policy="p", budget=1)
    table = np.asarray(np.corrcoef(samples.reshape(5, -1)))
    assert profile.correlation == pytest.approx(table[np.triu_indices(5, 1)].mean())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": [[1.0, float("nan")], [1.0, 1.0]]}, "layer 0, head 1 is nan"),
        ({"tokens": [[1.0, 1.0], [float("inf"), 1.0]]}, "layer 1, head 0 is inf"),
        ({"tokens": [[1.0, -2.0], [1.0, 1.0]]}, "layer 0, head 1 is -2.0"),
        ({"tokens": [[1.0, 1.0], [0.0, 0.0]]}, "layer 1, head 0 is 0.0: it must be positive"),
        ({"tokens": [[1.0], [1.0, 2.0]]}, "same number of heads"),
        ({"tokens": [[]]}, "same number of heads"),
        ({"tokens": []}, "must be a table of numbers"),
        ({"tokens": [["1"]]}, "must be a table of numbers"),
        ({"tokens": 4}, "must be a table of numbers"),
        ({"spread": [[1.0]]}, "spread must have the size of its tokens, 2 x 2, got 1 x 1"),
        ({"model": 3}, "model must be a string"),
        ({"budget": "x"}, "budget must be"),
        ({"budget": 0}, "budget must be"),
        ({"shape": {"num_layers": 2}}, "shape lacks hidden_size"),
        ({"shape": 5}, "shape must be an object"),
        ({"held_out": 5}, "held_out must be an object"),
    ],
)
def test_bad_profiles_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        Profile.from_json(json.dumps(GOOD | change))


@pytest.mark.parametrize("text", ["", "[1]", '{"model": "m"}'])
def test_what_is_no_profile_is_refused(text):
    with pytest.raises(ValueError, match="a profile must be a JSON object"):
        Profile.from_json(text)


def test_another_models_profile_is_refused():
    profile = Profile.uniform(30, 3, 64)
    profile.check_model(30, 3)
    with pytest.raises(ValueError, match="30 layers x 3 KV heads, llama has 32 x 8"):
        profile.check_model(32, 8, "llama")
    with pytest.raises(ValueError, match="its shape says 32 x 8"):
        replace(profile, shape=SHAPES["llama-3-8b"])


@pytest.mark.parametrize("shape", [(0, 2, 2), (2, 2)])
def test_samples_must_be_prompts_by_layers_by_heads(shape):
    with pytest.raises(ValueError, match="prompts, layers, heads"):
        Profile.from_samples(np.ones(shape), model="m", policy="p", budget=1)


def test_the_demo_model_has_a_measured_profile():
    profile = shipped_profile("SmolLM2-135M-Instruct", "ada_snapkv")
    assert profile is not None
    assert profile.shape == find_shape("smollm2-135m")
    assert profile.samples is not None
    assert profile.array.std(1).mean() / profile.array.mean() > 0.1  # no uniform placeholder
    held_out = dict(profile.held_out)
    assert held_out["fair_copying on 2"] > held_out["fair_copying, not routed, on 2"] > 0.9
    assert held_out["static on 2"] < 0.8


def test_other_models_and_policies_have_none():
    assert shipped_profile("SmolLM2-135M-Instruct", "snapkv") is None
    assert shipped_profile("Nobody-7B", "ada_snapkv") is None
