"""Draws synthetic head profiles with a given imbalance, for models without a measured one."""

import numpy as np

from fairkv_jax.plan import ModelShape, Profile

DEFAULT_IMBALANCE = 0.25
LAYER_SPREAD = 0.45
"""The defaults follow a measurement of SmolLM2-135M with Ada-SnapKV at a budget of 256, over 32
texts of 700 to 1,100 tokens. There, std / mean over the heads of a layer is 0.24 on average (median
0.26), and its relative standard deviation over layers is 0.48. Longer prompts and smaller budgets
increase the imbalance."""


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
    """Draws kept tokens as Ada-SnapKV distributes them: a minimum per head, and a pool per layer.

    The pool is distributed in proportion to log-normal strengths of the heads. These are scaled in
    each layer so that std / mean of the heads' tokens has a value that is drawn around `imbalance`,
    as far as the minimum allows. The mean over the heads of every layer is exactly the budget.

    >>> from fairkv_jax.plan import find_shape
    >>> from fairkv_jax.profile import synthetic_profile
    >>> profile = synthetic_profile(find_shape("llama-3.1-8b"), budget=1024, imbalance=0.5)
    >>> profile.array.shape, round(float(profile.array.mean()))
    ((32, 8), 1024)

    Args:
        budget: mean tokens per head, including the window.
        imbalance: mean over layers of std / mean of the heads' tokens; 0 makes all heads equal.
        window: number of tokens that every head keeps.
        alpha: fraction of the remaining budget that every head also keeps.

    Raises:
        ValueError: an argument is out of range.
    """
    if budget <= window:
        raise ValueError(
            f"budget {budget} must be larger than the window {window}: raise the budget or lower "
            "the window"
        )
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    if not imbalance >= 0:
        raise ValueError(f"imbalance must be at least 0, got {imbalance}")
    rng = np.random.default_rng(seed)
    floor = window + alpha * (budget - window)
    heads = shape.num_kv_heads
    # The imbalances of the layers are log-normal around `imbalance`.
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
    """Returns exp(s * normal), normalised to sum 1.

    Bisection finds the s for which std / mean of the tokens is `target`.
    """
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
