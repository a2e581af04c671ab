"""Allocators: how a layer's budget is spread over its heads, given everybody's scores.

Each takes scores [K, T] of a layer (0 on the window and on padding), the budgets [K] in tokens, the
prompt's length and the protected window, and marks what is kept, [K, T].
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fairkv_jax.select import keep_top

Scores = Float[Array, "K T"]
Budgets = Int[Array, "K"]
Scalar = Int[Array, ""]
Keep = Bool[Array, "K T"]


@dataclass(frozen=True)
class KeepAll:
    """The whole prompt."""

    def __call__(self, scores: Scores, budgets: Budgets, length: Scalar, window: Scalar) -> Keep:
        return jnp.broadcast_to(jnp.arange(scores.shape[1]) < length, scores.shape)


@dataclass(frozen=True)
class Uniform:
    """Every head keeps the window and its own best keys, up to its budget."""

    def __call__(self, scores: Scores, budgets: Budgets, length: Scalar, window: Scalar) -> Keep:
        candidates, recent = _split(scores, length, window)
        return keep_top(candidates, budgets - window) | recent


@dataclass(frozen=True)
class Blend:
    """Ada-SnapKV as first published (Feng et al., 2024): budgets follow the layer's best scores.

    With f_k of the layer's best keys in head k and c tokens a head outside the window, head k keeps
    its best round((1 - alpha) * f_k + floor(alpha * c)), ties of the rounding to even.
    """

    alpha: float

    def __call__(self, scores: Scores, budgets: Budgets, length: Scalar, window: Scalar) -> Keep:
        candidates, recent = _split(scores, length, window)
        room = budgets - window
        best = keep_top(candidates.reshape(-1), jnp.sum(room)).reshape(scores.shape)
        share = (1 - self.alpha) * jnp.sum(best, -1)
        quota = jnp.round(share + _floor_product(self.alpha, room)).astype(jnp.int32)
        return keep_top(candidates, quota) | recent


@dataclass(frozen=True)
class Reserve:
    """Ada-SnapKV with a reserve, the form of NVIDIA/kvpress: the layer's budget is met exactly.

    Each head first keeps its best max(1, floor(alpha * budget)), the window counting as best; then
    the layer's best keys fill up to the sum of the budgets.
    """

    alpha: float

    def __call__(self, scores: Scores, budgets: Budgets, length: Scalar, window: Scalar) -> Keep:
        candidates, recent = _split(scores, length, window)
        candidates = jnp.where(recent, jnp.inf, candidates)
        reserved = keep_top(candidates, jnp.maximum(1, _floor_product(self.alpha, budgets)))
        candidates = jnp.where(reserved, jnp.inf, candidates)
        return keep_top(candidates.reshape(-1), jnp.sum(budgets)).reshape(scores.shape)


def _split(scores: Scores, length: Scalar, window: Scalar) -> tuple[Scores, Bool[Array, "T"]]:
    """Scores with -inf on all that is not before the window, and the mask of the window."""
    position = jnp.arange(scores.shape[1])
    recent = (position >= length - window) & (position < length)
    return jnp.where(position < length - window, scores, -jnp.inf), recent


def _floor_product(alpha: float, tokens: Int[Array, "K"]) -> Int[Array, "K"]:
    """floor(alpha * tokens); the margin undoes the rounding of products that are whole."""
    return jnp.floor(alpha * tokens * (1 + 1e-6)).astype(jnp.int32)
