"""The scorers and allocators by name, and the methods that `kv_policy` composes of them."""

from collections.abc import Callable
from dataclasses import dataclass

from fairkv_jax.compress.allocators import AdaBlend, AdaReserve, CriticalAda, KeepAll, Uniform
from fairkv_jax.compress.budgets import with_policy
from fairkv_jax.compress.contract import Allocator, Method, Scorer
from fairkv_jax.compress.critical_ada import WithContributions
from fairkv_jax.compress.expected_attention import ExpectedAttention
from fairkv_jax.compress.keydiff import KeyDiff
from fairkv_jax.compress.knorm import KeyNorm
from fairkv_jax.compress.kvzip import Repetition
from fairkv_jax.compress.snapkv import WindowAttention
from fairkv_jax.compress.streaming_llm import Recency
from fairkv_jax.compress.tova import last_query_attention
from fairkv_jax.config import POLICIES, REQUEST_POLICIES, KVConfig


@dataclass(frozen=True)
class ScorerEntry:
    """How a scorer is made from the options, and what holds for its scores."""

    make: Callable[[KVConfig], Scorer]
    is_query_agnostic: bool
    """See `Method`; so is the following."""
    mean_over_heads: bool = False


def _recency(config: KVConfig) -> Recency:
    return Recency() if config.head_scores is None else Recency(config.head_scores.sinks)


def _keydiff(config: KVConfig) -> KeyDiff:
    if config.head_scores is None:
        return KeyDiff()
    return KeyDiff(num_sinks=config.head_scores.sinks, kernel=3)


SCORERS: dict[str, ScorerEntry] = {
    "streaming_llm": ScorerEntry(_recency, is_query_agnostic=True),
    "snapkv": ScorerEntry(WindowAttention.from_config, is_query_agnostic=False),
    "expected_attention": ScorerEntry(
        lambda config: ExpectedAttention(config.epsilon), is_query_agnostic=True
    ),
    "keydiff": ScorerEntry(_keydiff, is_query_agnostic=True),
    "knorm": ScorerEntry(lambda config: KeyNorm(), is_query_agnostic=True),
    "tova": ScorerEntry(
        lambda config: last_query_attention(), is_query_agnostic=False, mean_over_heads=True
    ),
    "kvzip": ScorerEntry(lambda config: Repetition(weighs_values=False), is_query_agnostic=True),
    "kvzip_plus": ScorerEntry(
        lambda config: Repetition(weighs_values=True), is_query_agnostic=True
    ),
}


def _ada(config: KVConfig) -> Allocator:
    if config.repeats_prompt:  # KVzip has no safeguard
        return AdaReserve(0.0)
    return _safeguarded(config)


def _safeguarded(config: KVConfig) -> Allocator:
    allocator = {"blend": AdaBlend, "reserve": AdaReserve}[config.safeguard]
    return allocator(config.alpha_safeguard)


ALLOCATORS: dict[str, Callable[[KVConfig], Allocator]] = {
    "full": lambda config: KeepAll(),
    "uniform": lambda config: Uniform(),
    # These differ from uniform in their budgets only, see `budgets`.
    "pyramid": lambda config: Uniform(),
    "head_budgets": lambda config: Uniform(),
    "duo": lambda config: Uniform(),
    "head_scores": lambda config: Uniform(),
    "ada": _ada,
    "critical_ada": lambda config: CriticalAda(_ada(config), config.alpha_safeguard),
}


def make_method(config: KVConfig) -> Method:
    """Returns the method that the configuration names.

    Raises:
        ValueError: the budget is smaller than the window.
    """
    entry = SCORERS[config.scorer_name]
    scorer = entry.make(config)
    if config.allocator_name == "critical_ada":
        scorer = WithContributions(scorer)
    if config.budget is not None and config.budget < scorer.window:
        raise ValueError(
            f"kv_budget {config.budget} is smaller than the window {scorer.window}: "
            "raise kv_budget or lower kv_window"
        )
    return Method(
        scorer,
        ALLOCATORS[config.allocator_name](config),
        entry.is_query_agnostic,
        entry.mean_over_heads,
    )


def make_decode_method(config: KVConfig) -> Method | None:
    """Returns the method that compresses rows while they decode; None where nothing does.

    Raises:
        ValueError: the budget is smaller than what is kept in any case.
    """
    if config.decode_budget is None:
        return None
    name, allocator = config.decode_method
    entry = SCORERS[name]
    scorer = entry.make(config)
    least = scorer.num_sinks + config.decode_window
    if config.decode_budget < least:
        first = f"{scorer.num_sinks} first and " if scorer.num_sinks else ""
        raise ValueError(
            f"kv_decode_budget {config.decode_budget} is smaller than the {first}"
            f"{config.decode_window} last tokens that every head keeps: raise it to {least} or more"
        )
    return Method(
        scorer,
        Uniform() if allocator == "uniform" else _safeguarded(config),
        entry.is_query_agnostic,
    )


def query_agnostic_policies() -> tuple[str, ...]:
    """Returns the policies whose choice does not depend on how the prompt ends."""
    return tuple(
        policy for policy, (scorer, _) in POLICIES.items() if SCORERS[scorer].is_query_agnostic
    )


def offered_methods(config: KVConfig) -> tuple[Method, ...]:
    """Returns the engine's own method, and those that a request may choose in its place."""
    others = [
        make_method(with_policy(config, name, budget=None, ratio=0.0)) for name in REQUEST_POLICIES
    ]
    return tuple(dict.fromkeys([make_method(config), *others]))
