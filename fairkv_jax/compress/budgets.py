"""How many tokens each KV head keeps of a prompt: budgets by layer and head.

Without JAX, so that schedulers and planners can use it.
"""

import math
from dataclasses import dataclass, replace

from fairkv_jax.config import REQUEST_POLICIES, KVConfig
from fairkv_jax.plan import HeadScores

PYRAMID_STEEPNESS = 20
"""PyramidKV's last layer keeps this fraction (1/20) of the mean outside the window."""
_BISECTIONS = 60
"""Halvings of the range of a factor, until it is exact to a token."""


def num_kept_tokens(config: KVConfig, prompt_tokens: int) -> int:
    """Returns the tokens kept per head, averaged over layers and heads and rounded down."""
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
    """Returns the budgets [L][K] in tokens, which an allocator may move within its scope.

    Only budgets from a table (`head_budgets`) may exceed the prompt.
    """
    if config.head_budgets is not None:
        return config.head_budgets
    kept = num_kept_tokens(config, prompt_tokens)
    if config.uses_head_scores or config.pools_layers:
        pairs = num_layers * num_heads
        total = pairs * kept
        if config.ratio is not None:
            total = max(pairs, pairs * prompt_tokens - int(pairs * prompt_tokens * config.ratio))
        if config.allocator_name == "duo":
            flat = _duo(config.head_scores, total, prompt_tokens)
        elif config.allocator_name == "head_scores":
            flat = _by_scores(config.head_scores, total, prompt_tokens)
        else:
            flat = [total // pairs + (index < total % pairs) for index in range(pairs)]
        rows = range(0, pairs, num_heads)
        return tuple(tuple(flat[row : row + num_heads]) for row in rows)
    layers = [kept] * num_layers
    if config.allocator_name == "pyramid" and kept < prompt_tokens:
        window = min(config.window, kept)
        layers = _pyramid(kept - window, prompt_tokens - window, num_layers)
        layers = [window + outside for outside in layers]
    return tuple((budget,) * num_heads for budget in layers)


@dataclass(frozen=True)
class MaxKept:
    """Upper bounds on the tokens that all heads together keep of a prompt."""

    in_all_layers: int
    in_one_layer: int

    @classmethod
    def of(cls, config: KVConfig, prompt_tokens: int, num_layers: int, num_heads: int) -> "MaxKept":
        """Returns bounds for every prompt of at most `prompt_tokens` tokens.

        They also hold for a prompt that is kept whole until the model has repeated it.
        """
        whole = num_heads * prompt_tokens
        # Ada-SnapKV rounds each head's quota, which may exceed its share by half a token.
        budgets = budgets_per_head(config, prompt_tokens, num_layers, num_heads)
        layers = [sum(min(budget + 1, prompt_tokens) for budget in layer) for layer in budgets]
        total = num_layers * whole if config.repeats_prompt else sum(layers)
        return cls(total, whole if config.spans_layers else max(layers))

    def in_layer_of(self, num_slots: int, num_tokens: int) -> int:
        """Returns the most that so many head slots keep of one layer of `num_tokens` tokens."""
        return min(self.in_one_layer, num_slots * num_tokens)


def request_kv_config(
    config: KVConfig, policy: str | None, budget: int | None, ratio: float | None = None
) -> KVConfig:
    """Applies one request's options to the engine's; None leaves an option as it is.

    Raises:
        ValueError: requests may not choose this policy, or the budget exceeds the engine's.
    """
    if policy is None and budget is None and ratio is None:
        return config
    allowed = request_policies(config)
    if policy is not None and policy not in allowed:
        names = ", ".join(allowed)
        raise ValueError(f"kv_policy {policy!r} is not for requests: use one of {names}")
    wanted = budget, ratio
    if wanted == (None, None):
        wanted = config.budget, config.ratio
    if policy is None or (policy == config.policy and config.is_plain):
        new = replace(config, budget=wanted[0], ratio=wanted[1])
    else:
        new = with_policy(config, policy, budget=wanted[0], ratio=wanted[1])
    if budget is not None and config.budget is not None and budget > config.budget:
        raise ValueError(
            f"kv_budget {budget} is beyond the {config.budget} that every request may keep: "
            "lower it, or raise the engine's own"
        )
    return new


def request_policies(config: KVConfig) -> tuple[str, ...]:
    """Returns the policies that requests may choose: the engine's own, and some that it offers."""
    own = [config.policy] if config.is_plain else []
    return tuple(dict.fromkeys([*own, *REQUEST_POLICIES]))


def check_least_kept(config: KVConfig, prompt_tokens: int) -> None:
    """Raises ValueError if less is asked for than heads of low scores keep of such a prompt."""
    if not config.uses_head_scores or config.head_scores is None:
        return
    sinks, recent = config.head_scores.sinks, config.head_scores.recent
    kept, least = num_kept_tokens(config, prompt_tokens), sinks + recent
    if kept >= least or prompt_tokens <= least:
        return
    given, remedy = f"kv_budget {config.budget}", f"raise it to at least {least}"
    if config.ratio is not None:
        limit = math.floor(1000 * (1 - least / prompt_tokens)) / 1000
        given = f"kv_ratio {config.ratio} leaves {kept} of {prompt_tokens} tokens per head, which"
        remedy = f"lower it to at most {limit}"
    raise ValueError(
        f"{given} is less than the {sinks} sinks and {recent} recent tokens that every head keeps: "
        f"{remedy}, or give kv_head_scores with fewer"
    )


def with_policy(
    config: KVConfig, policy: str, *, budget: int | None, ratio: float | None
) -> KVConfig:
    """Returns the options with another policy, without what belongs to the engine's own."""
    return replace(
        config,
        policy=policy,
        budget=budget,
        ratio=ratio,
        scorer=None,
        allocator=None,
        head_scores=None,
        head_budgets=None,
        decode_budget=None,
        decode_policy=None,
    )


def _duo(scores: HeadScores, total: int, prompt_tokens: int) -> list[int]:
    """Returns DuoAttention's budgets (Xiao et al., 2024), layer after layer.

    The heads of the highest scores keep the whole prompt, as far as the total goes, the next one
    takes what is left, and the others keep sinks and recent tokens: these in any case, so that the
    total of a short prompt may be larger.
    """
    flat = [score for layer in scores.scores for score in layer]
    least = min(prompt_tokens, scores.sinks + scores.recent)
    budgets = [least] * len(flat)
    spare = total - sum(budgets)
    for index in sorted(range(len(flat)), key=lambda index: -flat[index]):
        more = max(0, min(spare, prompt_tokens - least))
        budgets[index] += more
        spare -= more
    return budgets


def _by_scores(scores: HeadScores, total: int, prompt_tokens: int) -> list[int]:
    """Returns budgets in proportion to the square roots of the scores, layer after layer.

    No budget is less than sinks and recent tokens, and none exceeds the prompt. Budgets are rounded
    down, and the heads of the highest scores take what is left of the total.
    """
    flat = [max(0.0, score) for layer in scores.scores for score in layer]
    least = min(prompt_tokens, scores.sinks + scores.recent)
    weights = [math.sqrt(score) for score in flat]

    def of(scale: float) -> list[int]:
        return [max(least, min(prompt_tokens, int(scale * weight))) for weight in weights]

    low, high = 0.0, prompt_tokens / min((w for w in weights if w), default=1.0)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(of(middle)) <= total else (low, middle)
    budgets = of(low)
    spare = total - sum(budgets)
    for index in sorted(range(len(flat)), key=lambda index: -flat[index]):
        more = max(0, min(spare, prompt_tokens - budgets[index]))
        budgets[index] += more
        spare -= more
    return budgets


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
