"""The cached tokens per head of the emulated decode steps, published or synthetic."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from benchmarks.balance.published import read_profiles
from benchmarks.gpu_suite.inputs import Sizes
from fairkv_jax.plan import ModelShape, Profile
from fairkv_jax.profile import synthetic_profile

IMBALANCE = 0.6
"""Imbalance of the synthetic profiles."""
SYNTHETIC_PROMPTS = 28


@dataclass(frozen=True)
class HeadLengths:
    """The cached tokens of some prompts in every head, as fractions of their mean."""

    model: str
    profile: str
    """The scorer of a published profile, or "synthetic"."""
    prompts: np.ndarray
    """[prompts, L, K] with a mean of 1."""

    def at(self, mean_tokens: int) -> Profile:
        """The head profile of all prompts, scaled to this mean."""
        return Profile.from_samples(
            self.prompts * mean_tokens, model=self.model, policy=self.profile, budget=mean_tokens
        )

    def rows(self, batch: int, mean_tokens: int) -> np.ndarray:
        """Tokens [B, L, K] of a batch: the prompts in random order, again when none is left."""
        order = np.random.default_rng(7).permutation(len(self.prompts))
        chosen = self.prompts[np.resize(order, batch)]
        return np.maximum(1, (chosen * mean_tokens).round()).astype(np.int32)


def head_lengths(sizes: Sizes) -> Iterator[HeadLengths]:
    """Yields those of every model: of its profiles in the folder, or else of a synthetic one.

    Raises:
        ValueError: the folder holds no profile, or one of the wrong size.
    """
    published = list(read_profiles(sizes.profiles)) if sizes.profiles else []
    for model, shape in sizes.shapes.items():
        mine = [each for each in published if each.model.name.lower() == model]
        for each in mine:
            yield HeadLengths(model, each.scorer, _layers_of(each.kept, shape, model))
        if not mine:
            yield _synthetic(model, shape)


def _layers_of(kept: np.ndarray, shape: ModelShape, model: str) -> np.ndarray:
    """Takes evenly spaced layers of `kept` [prompts, L, K], where the shape has fewer."""
    every, left = divmod(kept.shape[1], shape.num_layers)
    if left or kept.shape[2] != shape.num_kv_heads:
        raise ValueError(
            f"the profile of {model} has {kept.shape[1]} layers x {kept.shape[2]} heads, which do "
            f"not fit {shape.num_layers} x {shape.num_kv_heads}"
        )
    chosen = kept[:, ::every]
    return chosen / chosen.mean()


def _synthetic(model: str, shape: ModelShape) -> HeadLengths:
    profile = synthetic_profile(shape, 1024, model=model, imbalance=IMBALANCE)
    rng = np.random.default_rng(7)
    size = SYNTHETIC_PROMPTS, *profile.array.shape
    prompts = profile.array * rng.lognormal(0, 0.1, size)
    return HeadLengths(model, "synthetic", prompts / prompts.mean())
