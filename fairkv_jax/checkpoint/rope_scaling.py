"""How published checkpoints stretch rotary positions, as divisors of the frequencies."""

import math

import numpy as np


def llama3_divisors(
    head_dim: int,
    theta: float,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_context: int,
) -> tuple[float, ...]:
    """Llama 3.1's stretching: 1 for fast rotations, `factor` for slow ones, blended between.

    A pair of dimensions is fast if it turns at least `high_freq_factor` times within the context
    that the model was first trained on, slow if at most `low_freq_factor` times. The H/2 divisors
    are float32, as GGUF files store them.
    """
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    turns = original_context / wavelengths
    fast = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
    divisors = 1 / (fast + (1 - fast) / factor)
    return tuple(divisors.astype(np.float32).tolist())
