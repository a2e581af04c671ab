"""How the keys and values of prompts are compressed."""

from dataclasses import dataclass
from typing import Any

from fairkv_jax.config.checks import (
    check_bool,
    check_choice,
    check_fraction,
    check_int,
    check_number,
    check_optional_choice,
)
from fairkv_jax.options import accept_old_names, option

SCORER_NAMES = (
    "streaming_llm",
    "snapkv",
    "expected_attention",
    "keydiff",
    "knorm",
    "tova",
    "kvzip",
    "kvzip_plus",
)
ALLOCATOR_NAMES = (
    "full",
    "uniform",
    "pyramid",
    "ada",
    "critical_ada",
    "head_budgets",
    "duo",
    "head_scores",
)
POLICIES = {
    "full": ("streaming_llm", "full"),
    "streaming_llm": ("streaming_llm", "uniform"),
    "snapkv": ("snapkv", "uniform"),
    "ada_snapkv": ("snapkv", "ada"),
    "pyramidkv": ("snapkv", "pyramid"),
    "head_budgets": ("snapkv", "head_budgets"),
    "expected_attention": ("expected_attention", "ada"),
    "keydiff": ("keydiff", "uniform"),
    "knorm": ("knorm", "uniform"),
    "tova": ("tova", "uniform"),
    "critical_ada": ("snapkv", "critical_ada"),
    "kvzip": ("kvzip", "ada"),
    "kvzip_plus": ("kvzip_plus", "ada"),
    "duo_attention": ("streaming_llm", "duo"),
    "retrieval_keydiff": ("keydiff", "head_scores"),
}
"""The scorer and the allocator that each policy names."""
REQUEST_POLICIES = ("streaming_llm", "snapkv", "ada_snapkv")
"""Policies that a request may choose in place of the server's."""
REPEATING_SCORERS = ("kvzip", "kvzip_plus")
"""Scorers that let the model repeat the prompt, once it has been read."""
POOLINGS = ("max", "avg")
SAFEGUARDS = ("blend", "reserve")
DECODE_POLICIES = ("snapkv", "ada_snapkv", "expected_attention", "keydiff")
"""Policies that can compress a row again while it decodes: their scorers need nothing but the
cached keys and values, and the last queries."""
_DECODE_SCORERS = tuple(POLICIES[policy][0] for policy in DECODE_POLICIES)
_DECODE_ALLOCATORS = tuple(POLICIES[policy][1] for policy in DECODE_POLICIES)
_QUERY_SCORERS = ("snapkv", "expected_attention")
DECODE_PROTECTED = 128
"""The last tokens of a row that are always kept when it is compressed while it decodes."""
DEFAULT_DECODE_POLICY = "ada_snapkv"
"""What compresses rows while they decode, where `kv_policy` keeps the prompts whole."""
STREAMING = ("recent", "snapkv")
SUFFIXES = ("keep", "compress")
_COMPRESSION = "Compression of the KV cache"


@accept_old_names
@dataclass(frozen=True)
class KVConfig:
    """How the keys and values of each prompt are compressed.

    Give either `budget` or `ratio`; the policies `full` and `head_budgets` take neither. The fields
    `decode_...` say how the cache of a request is compressed again while it generates.

    Raises:
        ValueError: the options contradict each other or lie outside their limits.
    """

    policy: str = option(
        "full",
        "Compression policy: a scorer, which says how much each token matters to each head, and an "
        "allocator, which spreads the budget over the heads. full: all tokens are kept. "
        "streaming_llm: the first and the last tokens are kept. snapkv: each head keeps the tokens "
        "that the end of the prompt attends to most. ada_snapkv: the same for a whole layer, so "
        "that its heads get different budgets. pyramidkv: like snapkv, with budgets that decrease "
        "with depth. head_budgets: like snapkv, with the budgets of kv_head_budgets. "
        "expected_attention: the tokens that later queries are expected to attend to. keydiff: "
        "the tokens whose keys are least alike. knorm: the tokens whose keys are shortest. tova: "
        "the tokens that the last one attends to. critical_ada: like ada_snapkv, with half of each "
        "budget chosen by what the values contribute. kvzip and kvzip_plus: the tokens that the "
        "model attends to when it repeats the prompt, which costs 2 to 3 prefills. duo_attention: "
        "the heads with the highest kv_head_scores keep all tokens, the others the first and the "
        "last ones. retrieval_keydiff: like keydiff, with budgets that grow with kv_head_scores.",
        name="kv_policy",
        group=_COMPRESSION,
        choices=tuple(POLICIES),
    )
    scorer: str | None = option(
        None,
        "Scorer, if not that of kv_policy.",
        name="kv_scorer",
        group=_COMPRESSION,
        choices=SCORER_NAMES,
        default_text="that of kv_policy",
    )
    allocator: str | None = option(
        None,
        "Allocator, if not that of kv_policy. uniform: the same budget for every head. pyramid: "
        "budgets that decrease with depth. ada: by the best scores of a layer, and with kvzip of "
        "all layers. critical_ada: as ada, and half of each budget by what the values contribute. "
        "head_budgets: those of kv_head_budgets. duo: all or little, by kv_head_scores. "
        "head_scores: in proportion to the square roots of kv_head_scores.",
        name="kv_allocator",
        group=_COMPRESSION,
        choices=ALLOCATOR_NAMES,
        default_text="that of kv_policy",
    )
    budget: int | None = option(
        None,
        "Tokens kept per head, averaged over all heads, including the window. Shorter prompts are "
        "kept whole.",
        name="kv_budget",
        group=_COMPRESSION,
    )
    ratio: float | None = option(
        None,
        "Fraction of each prompt that is removed, in [0, 1); use it instead of kv_budget.",
        name="kv_ratio",
        group=_COMPRESSION,
    )
    window: int = option(
        32,
        "Size of snapkv's observation window in tokens. These last tokens of a prompt are always "
        "kept, and their queries score the other tokens. With kv_decode_budget, as many of the "
        "last queries of every request are stored.",
        name="kv_window",
        group=_COMPRESSION,
    )
    pooling: str = option(
        "max",
        "Pooling of the scores along the prompt.",
        name="kv_pooling",
        group=_COMPRESSION,
        choices=POOLINGS,
        old_name="kv_pool",
    )
    kernel: int = option(
        7,
        "Width of the pooling in tokens; must be odd.",
        name="kv_kernel",
        group=_COMPRESSION,
    )
    pool_first: bool = option(
        False,
        "Pool the scores of each query head before they are averaged over the group, instead of "
        "after.",
        name="kv_pool_first",
        group=_COMPRESSION,
    )
    safeguard: str = option(
        "blend",
        "How ada protects heads with low scores: blend, as first published, or reserve, "
        "as in kvpress.",
        name="kv_safeguard",
        group=_COMPRESSION,
        choices=SAFEGUARDS,
        old_name="kv_floor",
    )
    alpha_safeguard: float = option(
        0.2,
        "Fraction of each head's budget that the safeguard protects, in [0, 1].",
        name="kv_alpha_safeguard",
        group=_COMPRESSION,
        old_name="kv_alpha",
    )
    epsilon: float = option(
        1e-2,
        "Added to the expected attention before it is multiplied by the norm of the value; 0 in "
        "kvpress.",
        name="kv_epsilon",
        group=_COMPRESSION,
    )
    head_scores: Any = option(
        None,
        "Path of head scores in JSON, see `python -m fairkv_jax.profile learn`, for duo_attention "
        "and retrieval_keydiff.",
        name="kv_head_scores",
        group=_COMPRESSION,
        type=str,
        default_text="head_scores.json beside the weights, else those of the demo model",
    )
    """A `plan.HeadScores`, or None: the model's own, which `build_engine` looks up."""
    streaming: str = option(
        "recent",
        "What the heads of duo_attention that do not keep everything keep. recent: the first and "
        "the most recent tokens. snapkv: as many tokens, chosen by SnapKV.",
        name="kv_streaming",
        group=_COMPRESSION,
        choices=STREAMING,
    )
    replay_suffix: str | None = option(
        None,
        "What kvzip writes between the instruction to repeat the prompt and the prompt.",
        name="kv_replay_suffix",
        group=_COMPRESSION,
        default_text="what ends a user's turn in the chat template, or a newline without one",
    )
    suffix: str = option(
        "keep",
        "What happens to the tokens that follow a cached prefix. keep: all are kept. compress: "
        "they are compressed like a prompt of their own, with a budget of their own.",
        name="kv_suffix",
        group=_COMPRESSION,
        choices=SUFFIXES,
    )
    decode_budget: int | None = option(
        None,
        "Tokens kept per head while a request generates, prompt included, averaged over the heads "
        "of a layer. When a request holds more, its cache is compressed again to this size, over "
        "prompt and output; the last 128 tokens and cached prefixes are always kept.",
        name="kv_decode_budget",
        group=_COMPRESSION,
        default_text="generated tokens are never dropped",
    )
    decode_interval: int = option(
        128,
        "Generated tokens between two such compressions.",
        name="kv_decode_interval",
        group=_COMPRESSION,
    )
    decode_policy: str | None = option(
        None,
        "Compression policy of kv_decode_budget.",
        name="kv_decode_policy",
        group=_COMPRESSION,
        choices=DECODE_POLICIES,
        default_text="the scorer and allocator of the prompts; ada_snapkv if those are kept whole",
    )
    head_budgets: tuple[tuple[int, ...], ...] | None = option(
        None,
        "Path of a head profile in JSON, whose tokens per layer and head are the budgets of the "
        "policy head_budgets.",
        name="kv_head_budgets",
        group=_COMPRESSION,
        type=str,
    )
    """Tokens kept for every layer and head, [L][K]."""

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            names = ", ".join(POLICIES)
            raise ValueError(f"unknown kv_policy {self.policy!r}: use one of {names}")
        check_optional_choice("kv_scorer", self.scorer, SCORER_NAMES)
        check_optional_choice("kv_allocator", self.allocator, ALLOCATOR_NAMES)
        check_choice("kv_streaming", self.streaming, STREAMING)
        if (self.allocator_name == "head_budgets") != (self.head_budgets is not None):
            raise ValueError(
                "kv_head_budgets goes with kv_policy or kv_allocator 'head_budgets', and no other: "
                "give both"
            )
        if self.head_scores is not None and not self.uses_head_scores:
            raise ValueError(
                "kv_head_scores goes with kv_allocator 'duo' or 'head_scores', not "
                f"{self.allocator_name!r}: drop it, or choose kv_policy 'duo_attention' or "
                "'retrieval_keydiff'"
            )
        if self.scorer is not None and self.allocator_name == "full":
            raise ValueError(
                f"kv_scorer {self.scorer!r} has no effect where every token is kept: choose a "
                "kv_policy or kv_allocator other than 'full'"
            )
        if not self.takes_budget:
            if self.budget is not None or self.ratio is not None:
                name = "policy" if self.allocator is None else "allocator"
                raise ValueError(
                    f"kv_{name} {self.allocator or self.policy!r} takes neither kv_budget nor "
                    "kv_ratio: drop them, or choose one that takes one"
                )
        elif (self.budget is None) == (self.ratio is None):
            raise ValueError(
                f"kv_{'policy' if self.allocator is None else 'allocator'} "
                f"{self.allocator or self.policy!r} needs either kv_budget or kv_ratio, got "
                f"kv_budget={self.budget} and kv_ratio={self.ratio}"
            )
        check_int("kv_window", self.window, 1)
        check_int("kv_kernel", self.kernel, 1)
        if self.kernel % 2 == 0:
            raise ValueError(f"kv_kernel must be odd, got {self.kernel}: use {self.kernel + 1}")
        check_bool("kv_pool_first", self.pool_first)
        check_choice("kv_pooling", self.pooling, POOLINGS)
        check_choice("kv_safeguard", self.safeguard, SAFEGUARDS)
        check_choice("kv_suffix", self.suffix, SUFFIXES)
        check_fraction("kv_alpha_safeguard", self.alpha_safeguard, closed=True)
        if self.ratio is not None:
            check_fraction("kv_ratio", self.ratio, closed=False)
        if self.budget is not None:
            check_int("kv_budget", self.budget, 1)
        check_number("kv_epsilon", self.epsilon, 0)
        if self.replay_suffix is not None and not isinstance(self.replay_suffix, str):
            raise ValueError(f"kv_replay_suffix must be a text, got {self.replay_suffix!r}")
        self._check_decode_options()

    def _check_decode_options(self) -> None:
        check_optional_choice("kv_decode_policy", self.decode_policy, DECODE_POLICIES)
        check_int("kv_decode_interval", self.decode_interval, 1)
        if self.decode_budget is None:
            if self.decode_policy is not None:
                raise ValueError(
                    f"kv_decode_policy {self.decode_policy!r} has no effect without "
                    "kv_decode_budget: give both"
                )
            return
        check_int("kv_decode_budget", self.decode_budget, 1)
        scorer, allocator = self.decode_method
        if scorer not in _DECODE_SCORERS or allocator not in _DECODE_ALLOCATORS:
            raise ValueError(
                f"kv_policy {self.policy!r}, with the scorer {scorer!r} and the allocator "
                f"{allocator!r}, cannot compress what a request generates: give kv_decode_policy, "
                f"one of {', '.join(DECODE_POLICIES)}, or leave out kv_decode_budget"
            )
        if self.decode_interval < self.num_stored_queries:
            raise ValueError(
                f"kv_decode_interval {self.decode_interval} is smaller than kv_window "
                f"{self.window}, but the queries of the window must be those of generated tokens: "
                "raise kv_decode_interval or lower kv_window"
            )

    @property
    def scorer_name(self) -> str:
        """The scorer in use."""
        if self.scorer is not None:
            return self.scorer
        if self.allocator_name == "duo" and self.streaming == "snapkv":
            return "snapkv"
        return POLICIES[self.policy][0]

    @property
    def allocator_name(self) -> str:
        """The allocator in use."""
        return self.allocator or POLICIES[self.policy][1]

    @property
    def decode_method(self) -> tuple[str, str]:
        """The scorer and the allocator that compress rows while they decode."""
        if self.decode_policy is not None:
            return POLICIES[self.decode_policy]
        if self.allocator_name == "full":
            return POLICIES[DEFAULT_DECODE_POLICY]
        return self.scorer_name, self.allocator_name

    @property
    def decode_window(self) -> int:
        """The last tokens of a row that are kept when it is compressed while it decodes."""
        return max(DECODE_PROTECTED, self.num_stored_queries)

    @property
    def num_stored_queries(self) -> int:
        """The last queries of a row that score its tokens while it decodes; 0: none are needed."""
        if self.decode_budget is None or self.decode_method[0] not in _QUERY_SCORERS:
            return 0
        return self.window

    @property
    def takes_budget(self) -> bool:
        """Whether a budget or a ratio says how many tokens are kept."""
        return takes_budget(self.allocator_name)

    @property
    def is_plain(self) -> bool:
        """Whether scorer and allocator are those that the policy names."""
        return (self.scorer_name, self.allocator_name) == POLICIES[self.policy]

    @property
    def pools_layers(self) -> bool:
        """Whether the tokens of all layers compete for one budget."""
        return self.repeats_prompt and self.allocator_name in ("ada", "critical_ada")

    @property
    def has_budget_per_head(self) -> bool:
        """Whether each head has a budget of its own that its scores do not change."""
        return self.allocator_name == "head_budgets" or self.uses_head_scores

    @property
    def uses_head_scores(self) -> bool:
        """Whether the budgets of the heads follow from their scores."""
        return self.allocator_name in ("duo", "head_scores")

    @property
    def spans_layers(self) -> bool:
        """Whether one layer may be kept whole, at least until the prompt has been repeated."""
        return self.uses_head_scores or self.repeats_prompt

    @property
    def repeats_prompt(self) -> bool:
        """Whether the model repeats the prompt before it is compressed."""
        return self.scorer_name in REPEATING_SCORERS and self.allocator_name != "full"


def takes_budget(allocator: str) -> bool:
    """Returns whether an allocator spreads a budget or a ratio that the user gives."""
    return allocator not in ("full", "head_budgets")
