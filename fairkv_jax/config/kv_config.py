"""How the keys and values of prompts are compressed."""

from dataclasses import dataclass

from fairkv_jax.config.checks import check_bool, check_choice, check_fraction, check_int
from fairkv_jax.options import accept_old_names, option

POLICY_NAMES = ("full", "streaming_llm", "snapkv", "ada_snapkv", "pyramidkv", "head_budgets")
POOLINGS = ("max", "avg")
SAFEGUARDS = ("blend", "reserve")
SUFFIXES = ("keep", "compress")
REQUEST_POLICIES = ("streaming_llm", "snapkv", "ada_snapkv")
"""Policies that a request may choose in place of the server's."""
_COMPRESSION = "Compression of the KV cache"


@accept_old_names
@dataclass(frozen=True)
class KVConfig:
    """How the keys and values of each prompt are compressed.

    Give either `budget` or `ratio`; the policies `full` and `head_budgets` take neither.

    Raises:
        ValueError: the options contradict each other or lie outside their limits.
    """

    policy: str = option(
        "full",
        "Compression policy. full: all tokens are kept. streaming_llm: the first and the last "
        "tokens are kept. snapkv: each head keeps its highest-scored tokens. ada_snapkv: the "
        "highest-scored tokens of a whole layer are kept, so that its heads get different budgets. "
        "pyramidkv: like snapkv, with budgets that decrease with depth. head_budgets: like snapkv, "
        "with the budgets of kv_head_budgets.",
        name="kv_policy",
        group=_COMPRESSION,
        choices=POLICY_NAMES,
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
        "Size of the observation window in tokens. These last tokens of a prompt are always kept, "
        "and their queries score the other tokens. streaming_llm does not use it.",
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
        "How ada_snapkv protects heads with low scores: blend, as first published, or reserve, "
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
    suffix: str = option(
        "keep",
        "What happens to the tokens that follow a cached prefix. keep: all are kept. compress: "
        "they are compressed like a prompt of their own, with a budget of their own.",
        name="kv_suffix",
        group=_COMPRESSION,
        choices=SUFFIXES,
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
