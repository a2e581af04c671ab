"""Frozen configurations: what the model is, what is kept of its cache, how it is run.

Standard library only, so that the planner and the tools can read them without JAX.
"""

from dataclasses import dataclass, replace
from numbers import Integral, Real

POLICY_NAMES = ("full", "streaming_llm", "snapkv", "ada_snapkv", "pyramidkv", "head_budgets")
POOLS = ("max", "avg")
PYRAMID_STEEPNESS = 20
"""PyramidKV's last layer keeps a twentieth of the mean outside the window, its first the rest."""
FLOORS = ("blend", "reserve")
REQUEST_POLICIES = ("streaming_llm", "snapkv", "ada_snapkv")
"""Policies that a request may choose in place of the server's."""
QUANTIZATIONS = ("int8",)


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder-only transformer with rotary positions and grouped queries."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool = False
    """Whether queries, keys and values have biases (Qwen 2)."""
    qk_norm: bool = False
    """Whether every query and key head is normalised before its rotation (Qwen 3)."""
    rope_divisors: tuple[float, ...] | None = None
    """What each of the H/2 rotary frequencies is divided by (Llama 3.1); None: they stay."""
    activation: str = "silu"
    """The activation of the MLP's gate: "silu", or "gelu_tanh" (Gemma)."""
    norm_offset: float = 0.0
    """What is added to the weights of norms before they scale (1 in Gemma)."""
    scale_embeddings: bool = False
    """Whether embeddings are multiplied by the square root of the hidden size (Gemma)."""

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_heads} query heads do not divide over {self.num_kv_heads} KV heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}")
        if self.rope_divisors is not None and len(self.rope_divisors) != self.head_dim // 2:
            raise ValueError(
                f"{len(self.rope_divisors)} divisors of rotary frequencies do not fit the "
                f"{self.head_dim // 2} frequencies of head_dim {self.head_dim}"
            )

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head (G)."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True)
class KVConfig:
    """What is kept of each prompt's keys and values.

    Give either `budget` or `ratio`; the policy `full` takes neither.

    Raises:
        ValueError: the options contradict each other or lie outside their limits.
    """

    policy: str = "full"
    budget: int | None = None
    """Kept tokens a head on average, the window included."""
    ratio: float | None = None
    """The fraction removed of each prompt: max(1, int(T * (1 - ratio))) tokens a head are kept."""
    window: int = 32
    """Last prompt tokens: they are always kept, and their queries score the others."""
    pool: str = "max"
    kernel: int = 7
    """Width, odd, of the pooling of scores along the prompt."""
    pool_first: bool = False
    """Pool each query head's scores before their mean over the group, instead of after."""
    floor: str = "blend"
    """How Ada-SnapKV protects weak heads: "blend" (as published) or "reserve" (as in kvpress)."""
    alpha: float = 0.2
    """The protected fraction of a head's budget, in [0, 1]."""
    head_budgets: tuple[tuple[int, ...], ...] | None = None
    """For the policy `head_budgets`: kept tokens of every layer and head, [L][K]."""

    def __post_init__(self) -> None:
        if self.policy not in POLICY_NAMES:
            names = ", ".join(POLICY_NAMES)
            raise ValueError(f"unknown kv_policy {self.policy!r}: use one of {names}")
        if (self.policy == "head_budgets") != (self.head_budgets is not None):
            raise ValueError(
                "kv_head_budgets goes with kv_policy 'head_budgets', and no other: give both"
            )
        if self.policy in ("full", "head_budgets"):
            if self.budget is not None or self.ratio is not None:
                raise ValueError(
                    f"kv_policy {self.policy!r} takes neither kv_budget nor kv_ratio: drop them, "
                    "or choose a policy that takes one"
                )
        elif (self.budget is None) == (self.ratio is None):
            raise ValueError(
                f"kv_policy {self.policy!r} needs either kv_budget or kv_ratio, "
                f"got kv_budget={self.budget} and kv_ratio={self.ratio}"
            )
        _check_int("kv_window", self.window, 1)
        _check_int("kv_kernel", self.kernel, 1)
        if self.kernel % 2 == 0:
            raise ValueError(f"kv_kernel must be odd, got {self.kernel}: use {self.kernel + 1}")
        if not isinstance(self.pool_first, bool):
            raise ValueError(f"kv_pool_first must be True or False, got {self.pool_first!r}")
        _check_choice("kv_pool", self.pool, POOLS)
        _check_choice("kv_floor", self.floor, FLOORS)
        _check_fraction("kv_alpha", self.alpha, closed=True)
        if self.ratio is not None:
            _check_fraction("kv_ratio", self.ratio, closed=False)
        if self.budget is not None:
            _check_int("kv_budget", self.budget, 1)

    def of_request(self, policy: str | None, budget: int | None) -> "KVConfig":
        """These options with what one request wants in their place; None: nothing special.

        Raises:
            ValueError: the policy is not for requests to choose, or it keeps more than this one.
        """
        if policy is None and budget is None:
            return self
        policy = policy or self.policy
        if policy not in (self.policy, *REQUEST_POLICIES):
            names = ", ".join(dict.fromkeys([self.policy, *REQUEST_POLICIES]))
            raise ValueError(f"kv_policy {policy!r} is not for requests: use one of {names}")
        if budget is not None and self.budget is not None and budget > self.budget:
            raise ValueError(
                f"kv_budget {budget} is beyond the {self.budget} that every request may keep: "
                "lower it, or raise the engine's own"
            )
        return replace(
            self,
            policy=policy,
            budget=self.budget if budget is None else budget,
            ratio=self.ratio if budget is None else None,
            head_budgets=self.head_budgets if policy == self.policy else None,
        )

    def kept_tokens(self, prompt_tokens: int) -> int:
        """Tokens kept per head, on average, of a prompt of that length."""
        if self.head_budgets is not None:
            kept = [min(budget, prompt_tokens) for layer in self.head_budgets for budget in layer]
            return sum(kept) // len(kept)
        if self.budget is not None:
            return min(self.budget, prompt_tokens)
        if self.ratio is not None:
            return max(1, int(prompt_tokens * (1 - self.ratio)))
        return prompt_tokens

    def budgets(
        self, prompt_tokens: int, num_layers: int, num_heads: int
    ) -> tuple[tuple[int, ...], ...]:
        """Budgets [L][K] in tokens; what heads keep may then be moved within a layer."""
        if self.head_budgets is not None:
            return self.head_budgets
        kept = self.kept_tokens(prompt_tokens)
        layers = [kept] * num_layers
        if self.policy == "pyramidkv" and kept < prompt_tokens:
            window = min(self.window, kept)
            layers = _pyramid(kept - window, prompt_tokens - window, num_layers)
            layers = [window + outside for outside in layers]
        return tuple((budget,) * num_heads for budget in layers)

    def most_kept_of_a_layer(self, prompt_tokens: int, num_layers: int, num_heads: int) -> int:
        """An upper bound of the tokens that all heads of a layer keep, for prompts up to that."""
        # Rounded quotas may exceed a budget by half a token a head.
        budgets = self.budgets(prompt_tokens, num_layers, num_heads)
        return max(sum(min(budget + 1, prompt_tokens) for budget in layer) for layer in budgets)


def _pyramid(mean: int, most: int, num_layers: int) -> list[int]:
    """Falling budgets of that exact mean, the first at most `most` (Cai et al., 2024).

    They fall linearly from first to last; sums of the line are rounded, so that none is lost.
    """
    last = mean // PYRAMID_STEEPNESS
    first = min(2 * mean - last, most)
    last = 2 * mean - first
    steps = max(num_layers - 1, 1)

    def total(layers: int) -> int:
        drop = (first - last) * layers * (layers - 1)
        return (2 * steps * layers * first - drop) // (2 * steps)

    if num_layers == 1:
        return [mean]
    return [total(layer + 1) - total(layer) for layer in range(num_layers)]


@dataclass(frozen=True)
class EngineConfig:
    """How the engine runs the model: devices, sizes, memory.

    Raises:
        ValueError: a size is not positive.
    """

    tensor_parallel_size: int = 1
    max_model_len: int = 8192
    """Most tokens of one request, prompt and output together."""
    max_num_seqs: int = 8
    """Rows of the decode batch (B)."""
    page_size: int = 16
    """Tokens a page of the KV pool; a multiple of 8, which the GPUs' bulk copies need."""
    kv_cache_bytes: int = 1 << 30
    """Bytes of the KV pool, over all devices."""
    dtype: str = "float32"
    quantization: str | None = None
    """Of the weights: "int8", or None for the type above."""
    seed: int = 0
    prefill_block: int = 128
    """Prompt tokens that pass a layer at a time; between two blocks, others may decode."""
    attention_backend: str = "auto"
    """The implementation of decode attention; "auto" goes by the kind of device."""

    def __post_init__(self) -> None:
        for name in ("tensor_parallel_size", "max_num_seqs", "kv_cache_bytes", "prefill_block"):
            _check_int(name, getattr(self, name), 1)
        _check_int("max_model_len", self.max_model_len, 2)
        _check_int("seed", self.seed, 0)
        if self.quantization is not None:
            _check_choice("quantization", self.quantization, QUANTIZATIONS)
        _check_int("page_size", self.page_size, 8)
        if self.page_size % 8:
            raise ValueError(f"page_size must be a multiple of 8, got {self.page_size}")


def _check_int(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < low:
        raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _check_fraction(name: str, value: float, *, closed: bool) -> None:
    """Checks 0 <= value <= 1, or 0 <= value < 1 where `closed` is false."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not (0 <= value <= 1 if closed else 0 <= value < 1):
        raise ValueError(f"{name} must lie in [0, 1{']' if closed else ')'}, got {value!r}")
