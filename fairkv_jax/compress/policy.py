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
        self, scores: Float[Array, "K T"], length: Int[Array, ""], budgets: Int[Array, "K"]
    ) -> Bool[Array, "K T"]:
        """Marks the kept tokens of every head; a prompt within its budget is kept whole."""
        window = jnp.minimum(self.scorer.window, jnp.min(budgets))
        keep = self.allocator(scores, budgets, length, window)
        is_prompt = jnp.arange(scores.shape[1]) < length
        return jnp.where((budgets >= length)[:, None], is_prompt, keep & is_prompt)


def _full(config: KVConfig) -> Policy:
    return Policy(PositionScorer(), KeepAll())


def _streaming_llm(config: KVConfig) -> Policy:
    return Policy(PositionScorer(), Uniform())


def _snapkv(config: KVConfig) -> Policy:
    return Policy(WindowAttention.from_config(config), Uniform())


def _ada_snapkv(config: KVConfig) -> Policy:
    safeguard = {"blend": Blend, "reserve": Reserve}[config.safeguard]
    return Policy(WindowAttention.from_config(config), safeguard(config.alpha_safeguard))


# PyramidKV and tables of budgets choose keys as SnapKV does; their budgets are in `KVConfig`.
POLICIES: dict[str, Callable[[KVConfig], Policy]] = {
    "full": _full,
    "streaming_llm": _streaming_llm,
    "snapkv": _snapkv,
    "ada_snapkv": _ada_snapkv,
    "pyramidkv": _snapkv,
    "head_budgets": _snapkv,
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
