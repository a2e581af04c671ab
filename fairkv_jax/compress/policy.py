"""The policies by name, and what a selection looks like."""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fairkv_jax.compress.allocators import Blend, KeepAll, Reserve, Uniform
from fairkv_jax.compress.scorers import PositionScorer, WindowAttention
from fairkv_jax.config import KVConfig

Scorer = PositionScorer | WindowAttention
Allocator = KeepAll | Uniform | Blend | Reserve


@dataclass(frozen=True)
class Policy:
    """What to keep of a prompt, layer by layer; hashable, a static argument of the prefill."""

    scorer: Scorer
    allocator: Allocator

    def select(
        self, scores: Float[Array, "K T"], length: Int[Array, ""], budget: Int[Array, ""]
    ) -> Bool[Array, "K T"]:
        """Marks the kept tokens of every head; a prompt within the budget is kept whole."""
        num_heads, num_tokens = scores.shape
        window = jnp.minimum(self.scorer.window, budget)
        keep = self.allocator(scores, jnp.full(num_heads, budget), length, window)
        return jnp.where(budget >= length, jnp.arange(num_tokens) < length, keep)


def _full(config: KVConfig) -> Policy:
    return Policy(PositionScorer(), KeepAll())


def _streaming_llm(config: KVConfig) -> Policy:
    return Policy(PositionScorer(), Uniform())


def _snapkv(config: KVConfig) -> Policy:
    return Policy(WindowAttention.from_config(config), Uniform())


def _ada_snapkv(config: KVConfig) -> Policy:
    floor = {"blend": Blend, "reserve": Reserve}[config.floor]
    return Policy(WindowAttention.from_config(config), floor(config.alpha))


POLICIES: dict[str, Callable[[KVConfig], Policy]] = {
    "full": _full,
    "streaming_llm": _streaming_llm,
    "snapkv": _snapkv,
    "ada_snapkv": _ada_snapkv,
}


def make_policy(config: KVConfig) -> Policy:
    """The policy that the configuration names.

    Raises:
        ValueError: the budget is below the window.
    """
    policy = POLICIES[config.policy](config)
    window = policy.scorer.window
    if config.budget is not None and config.budget < window:
        raise ValueError(
            f"kv_budget {config.budget} is smaller than the window {window}: "
            "raise kv_budget or lower kv_window"
        )
    return policy
