"""How many tokens each KV head keeps of a prompt: budgets by layer and head.

Standard library only, so that schedulers and planners can use it without JAX.
"""

from dataclasses import replace

from fairkv_jax.config import REQUEST_POLICIES, KVConfig

PYRAMID_STEEPNESS = 20
"""PyramidKV's last layer keeps this fraction (1/20) of the mean outside the window."""


def num_kept_tokens(config: KVConfig, prompt_tokens: int) -> int:
    """Returns the tokens kept per head, averaged over layers and heads."""
    if config.head_budgets is not None:
        kept = [min(budget, prompt_tokens) for layer in config.head_budgets for budget in layer]
        return sum(kept) // len(kept)
    if config.budget is not None:
        return min(config.budget, prompt_tokens)
    if config.ratio is not None:
        return max(1, int(prompt_tokens * (1 - config.ratio)))
    return prompt_tokens


def budgets_per_head(
    config: KVConfig, prompt_tokens: int, num_layers: int, num_heads: int
) -> tuple[tuple[int, ...], ...]:
    """Returns the budgets [L][K] in tokens, which an allocator may move within a layer.

    Only budgets from a table (`head_budgets`) may exceed the prompt.
    """
    if config.head_budgets is not None:
        return config.head_budgets
    kept = num_kept_tokens(config, prompt_tokens)
    layers = [kept] * num_layers
    if config.policy == "pyramidkv" and kept < prompt_tokens:
        window = min(config.window, kept)
        layers = _pyramid(kept - window, prompt_tokens - window, num_layers)
        layers = [window + outside for outside in layers]
    return tuple((budget,) * num_heads for budget in layers)


def max_kept_per_layer(
    config: KVConfig, prompt_tokens: int, num_layers: int, num_heads: int
) -> int:
    """Returns an upper bound on the tokens that all heads of one layer keep together.

    The bound holds for every prompt of at most `prompt_tokens` tokens.
    """
    # Ada-SnapKV rounds each head's quota, which may exceed its share by half a token.
    budgets = budgets_per_head(config, prompt_tokens, num_layers, num_heads)
    return max(sum(min(budget + 1, prompt_tokens) for budget in layer) for layer in budgets)


def request_kv_config(
    config: KVConfig, policy: str | None, budget: int | None, ratio: float | None = None
) -> KVConfig:
    """Applies one request's options to the engine's; None leaves an option as it is.

    Raises:
        ValueError: requests may not choose this policy, or the budget exceeds the engine's.
    """
    if policy is None and budget is None and ratio is None:
        return config
    policy = policy or config.policy
    if policy not in (config.policy, *REQUEST_POLICIES):
        names = ", ".join(dict.fromkeys([config.policy, *REQUEST_POLICIES]))
        raise ValueError(f"kv_policy {policy!r} is not for requests: use one of {names}")
    if budget is not None and config.budget is not None and budget > config.budget:
        raise ValueError(
            f"kv_budget {budget} is beyond the {config.budget} that every request may keep: "
            "lower it, or raise the engine's own"
        )
    return replace(
        config,
        policy=policy,
        budget=config.budget if budget is None and ratio is None else budget,
        ratio=config.ratio if budget is None and ratio is None else ratio,
        head_budgets=config.head_budgets if policy == config.policy else None,
    )


def _pyramid(mean: int, maximum: int, num_layers: int) -> list[int]:
    """Returns budgets that fall linearly over the layers and have exactly this mean.

    PyramidKV (Cai et al., 2024). The first layer gets at most `maximum`. Rounding the cumulative
    sums of the line, rather than its values, keeps the total exact.
    """
    if num_layers == 1:
        return [mean]
    last = mean // PYRAMID_STEEPNESS
    first = min(2 * mean - last, maximum)
    last = 2 * mean - first
    steps = num_layers - 1

    def total_of_first(layers: int) -> int:
        drop = (first - last) * layers * (layers - 1)
        return (2 * steps * layers * first - drop) // (2 * steps)

    return [total_of_first(layer + 1) - total_of_first(layer) for layer in range(num_layers)]
