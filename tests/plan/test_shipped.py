"""The profile that comes with the project fits the model that it is for."""

from fairkv_jax.plan import find_shape, shipped_profile


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
