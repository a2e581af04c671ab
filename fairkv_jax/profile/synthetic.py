"""Profiles for models that nobody measured here: imbalance is one number."""

import numpy as np

from fairkv_jax.plan import ModelShape, Profile

DEFAULT_IMBALANCE = 0.25
LAYER_SPREAD = 0.45
"""As measured on SmolLM2-135M with Ada-SnapKV at a budget of 256, over 32 texts of 700 to 1,100
tokens: std / mean of a layer's heads is 0.24 in the mean over layers (0.26 in the median), and
varies over layers by 0.48 of that. Long prompts and few tokens make it larger."""


def synthetic_profile(
    shape: ModelShape,
    budget: int,
    *,
    model: str = "",
    imbalance: float = DEFAULT_IMBALANCE,
    window: int = 32,
    alpha: float = 0.2,
    seed: int = 0,
) -> Profile:
    """Draws kept tokens as Ada-SnapKV deals them: a floor, and a layer's pool by head strength.

    The strengths are log-normal; each layer is then stretched or flattened so that the standard
    deviation of its heads' tokens over their mean is as drawn around `imbalance`, as far as the
    floor allows. Every layer keeps exactly the budget on average.

    Args:
        budget: tokens a head on average, the window included.
        imbalance: the mean over layers of std / mean of a layer's tokens; 0 is uniform.
        window, alpha: what every head keeps: the window and alpha of the rest.

    Raises:
        ValueError: a figure is out of range.
    """
    if budget <= window:
        raise ValueError(f"budget {budget} must be larger than the window {window}")
    if not 0 <= alpha <= 1 or not imbalance >= 0:
        raise ValueError(f"alpha must lie in [0, 1], imbalance be positive: {alpha}, {imbalance}")
    rng = np.random.default_rng(seed)
    floor = window + alpha * (budget - window)
    heads = shape.num_kv_heads
    # A log-normal of mean 1: layers differ in their imbalance too.
    drawn = rng.normal(-(LAYER_SPREAD**2) / 2, LAYER_SPREAD, shape.num_layers)
    wanted = imbalance * np.exp(drawn)
    tokens = [
        floor + (budget - floor) * heads * _strengths(rng.normal(size=heads), target, budget, floor)
        for target in wanted
    ]
    return Profile(
        model=model,
        policy="ada_snapkv",
        budget=budget,
        tokens=np.array(tokens).tolist(),
        source=f"synthetic, imbalance {imbalance}, seed {seed}",
        shape=shape,
    )


def _strengths(normal: np.ndarray, target: float, budget: float, floor: float) -> np.ndarray:
    """exp(s * normal), normalised to 1, with s such that the tokens vary by `target`; bisected."""
    scale = (budget - floor) * len(normal)

    def strengths(s: float) -> np.ndarray:
        raised = np.exp(s * (normal - normal.max()))
        return raised / raised.sum()

    low, high = 0.0, 20.0
    for _ in range(50):
        middle = (low + high) / 2
        if (scale * strengths(middle)).std() / budget < target:
            low = middle
        else:
            high = middle
    return strengths(low)
