"""Allocators: how a layer's budget is spread over its heads. See `contract.Allocator`."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from fairkv_jax.compress.contract import Allocator, Scores
from fairkv_jax.select import keep_top

_CRITICAL_EPSILON = 1e-4
"""Added to the scores, so that a value counts also where its token got no attention."""

Budgets = Int[Array, "K"]
Keep = Bool[Array, "K T"]


@dataclass(frozen=True)
class KeepAll:
    """Every head keeps the whole prompt."""

    def __call__(self, scores: Scores, budgets: Budgets) -> Keep:
        return scores.primary > -jnp.inf


@dataclass(frozen=True)
class Uniform:
    """Every head keeps its own best tokens, up to its budget."""

    def __call__(self, scores: Scores, budgets: Budgets) -> Keep:
        return keep_top(scores.primary, budgets)


@dataclass(frozen=True)
class AdaBlend:
    """Ada-SnapKV as first published (Feng et al., 2024): budgets follow the layer's best scores.

    Let c be a head's budget without its protected tokens, and f_k the number of the layer's
    sum(c) best tokens that are in head k. Then head k keeps its best
    round((1 - alpha) * f_k + floor(alpha * c)) tokens; halves are rounded to the even number. A
    head without protected tokens keeps at least one.
    """

    alpha: float

    def __call__(self, scores: Scores, budgets: Budgets) -> Keep:
        protected = scores.primary == jnp.inf
        candidates = jnp.where(protected, -jnp.inf, scores.primary)
        remaining = budgets - jnp.sum(protected, -1)
        best = keep_top(candidates.reshape(-1), jnp.sum(remaining)).reshape(candidates.shape)
        share = (1 - self.alpha) * jnp.sum(best, -1)
        quota = jnp.round(share + _floor_product(self.alpha, remaining)).astype(jnp.int32)
        quota = jnp.maximum(quota, jnp.all(~protected, -1))
        return keep_top(candidates, quota) | protected


@dataclass(frozen=True)
class AdaReserve:
    """Ada-SnapKV as in NVIDIA/kvpress: a reserve per head, and the layer's budget is met exactly.

    Each head first keeps its best max(1, floor(alpha * budget)) tokens, protected tokens first.
    Then the layer's best tokens are kept until the sum of the budgets is reached.
    """

    alpha: float

    def __call__(self, scores: Scores, budgets: Budgets) -> Keep:
        reserved = keep_top(scores.primary, jnp.maximum(1, _floor_product(self.alpha, budgets)))
        candidates = jnp.where(reserved, jnp.inf, scores.primary)
        return keep_top(candidates.reshape(-1), jnp.sum(budgets)).reshape(candidates.shape)


@dataclass(frozen=True)
class CriticalAda:
    """Two stages within the budgets that another allocator gives (CriticalKV, Feng et al., 2025).

    Each head keeps the first half of its budget by its scores, and the rest by (score + 1e-4) times
    what the token's value contributes, which is `Scores.secondary`. Scores that can be negative
    are raised by their minimum for that. As in NVIDIA/kvpress, the first stage keeps at least the
    head's reserve, which is max(1, floor(alpha * budget)) with the budget that it had before.
    """

    budgets_by: Allocator
    alpha: float

    def __call__(self, scores: Scores, budgets: Budgets) -> Keep:
        assert scores.secondary is not None
        counts = jnp.sum(self.budgets_by(scores, budgets), -1)
        reserve = jnp.maximum(1, _floor_product(self.alpha, budgets))
        first = keep_top(scores.primary, jnp.minimum(counts, jnp.maximum(counts // 2, reserve)))
        first |= scores.primary == jnp.inf
        is_finite = jnp.isfinite(scores.primary)
        lowest = jnp.min(jnp.where(is_finite, scores.primary, 0), -1, keepdims=True)
        critical = (scores.primary - lowest + _CRITICAL_EPSILON) * scores.secondary
        rest = jnp.where(is_finite, critical, scores.primary)
        return keep_top(jnp.where(first, jnp.inf, rest), counts)


def _floor_product(alpha: float, tokens: Int[Array, "K"]) -> Int[Array, "K"]:
    """Returns floor(alpha * tokens); the margin makes up for products rounded below an integer."""
    return jnp.floor(alpha * tokens * (1 + 1e-6)).astype(jnp.int32)
