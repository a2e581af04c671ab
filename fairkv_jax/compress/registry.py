"""The compression methods by name, which are the values of `kv_policy`."""

from collections.abc import Callable
from dataclasses import replace

from fairkv_jax.compress.allocators import AdaBlend, AdaReserve, KeepAll, Uniform
from fairkv_jax.compress.contract import Method
from fairkv_jax.compress.snapkv import WindowAttention
from fairkv_jax.compress.streaming_llm import Recency
from fairkv_jax.config import REQUEST_POLICIES, KVConfig


def _full(config: KVConfig) -> Method:
    return Method(Recency(), KeepAll(), is_query_agnostic=True)


def _streaming_llm(config: KVConfig) -> Method:
    return Method(Recency(), Uniform(), is_query_agnostic=True)


def _snapkv(config: KVConfig) -> Method:
    return Method(WindowAttention.from_config(config), Uniform(), is_query_agnostic=False)


def _ada_snapkv(config: KVConfig) -> Method:
    allocator = {"blend": AdaBlend, "reserve": AdaReserve}[config.safeguard](config.alpha_safeguard)
    return Method(WindowAttention.from_config(config), allocator, is_query_agnostic=False)


METHODS: dict[str, Callable[[KVConfig], Method]] = {
    "full": _full,
    "streaming_llm": _streaming_llm,
    "snapkv": _snapkv,
    "ada_snapkv": _ada_snapkv,
    # These two differ from SnapKV in their budgets only, see `budgets`.
    "pyramidkv": _snapkv,
    "head_budgets": _snapkv,
}


def make_method(config: KVConfig) -> Method:
    """Returns the method that the configuration names.

    Raises:
        ValueError: the budget is smaller than the window.
    """
    method = METHODS[config.policy](config)
    window = method.scorer.window
    if config.budget is not None and config.budget < window:
        raise ValueError(
            f"kv_budget {config.budget} is smaller than the window {window}: "
            "raise kv_budget or lower kv_window"
        )
    return method


def query_agnostic_policies() -> tuple[str, ...]:
    """Returns the policies whose choice does not depend on how the prompt ends."""
    names = [name for name, make in METHODS.items() if make(KVConfig()).is_query_agnostic]
    return tuple(names)


def offered_methods(config: KVConfig) -> tuple[Method, ...]:
    """Returns the engine's own method, and those that a request may choose in its place."""
    others = [
        make_method(replace(config, policy=name, budget=None, ratio=0.0, head_budgets=None))
        for name in REQUEST_POLICIES
    ]
    return tuple(dict.fromkeys([make_method(config), *others]))
