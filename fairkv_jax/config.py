"""Frozen configurations: the model's shape, KV-cache compression, and how the engine runs.

The fields that users may set are declared as options, from which the command lines, the keyword
arguments of `LLM` and README's table derive. Standard library only, so that the planner and the
tools can read configurations without importing JAX.
"""

import os
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from fairkv_jax.options import accept_old_names, option, options_of

POLICY_NAMES = ("full", "streaming_llm", "snapkv", "ada_snapkv", "pyramidkv", "head_budgets")
POOLINGS = ("max", "avg")
SAFEGUARDS = ("blend", "reserve")
SUFFIXES = ("keep", "compress")
REQUEST_POLICIES = ("streaming_llm", "snapkv", "ada_snapkv")
"""Policies that a request may choose in place of the server's."""
DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("int8",)

_MODEL = "Model"
_DEVICES = "Devices and memory"
_COMPRESSION = "Compression of the KV cache"
_DEBUGGING = "Debugging"


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder-only transformer with rotary positions and grouped-query attention."""

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
    """Whether queries and keys are normalised per head before RoPE (Qwen 3)."""
    rope_divisors: tuple[float, ...] | None = None
    """Divisors of the H/2 rotary frequencies (Llama 3.1); None: the frequencies are unchanged."""
    activation: str = "silu"
    """The activation of the MLP's gate: "silu", or "gelu_tanh" (Gemma)."""
    norm_offset: float = 0.0
    """Added to the weights of norms before they scale (1 in Gemma)."""
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
        _check_int("kv_window", self.window, 1)
        _check_int("kv_kernel", self.kernel, 1)
        if self.kernel % 2 == 0:
            raise ValueError(f"kv_kernel must be odd, got {self.kernel}: use {self.kernel + 1}")
        _check_bool("kv_pool_first", self.pool_first)
        _check_choice("kv_pooling", self.pooling, POOLINGS)
        _check_choice("kv_safeguard", self.safeguard, SAFEGUARDS)
        _check_choice("kv_suffix", self.suffix, SUFFIXES)
        _check_fraction("kv_alpha_safeguard", self.alpha_safeguard, closed=True)
        if self.ratio is not None:
            _check_fraction("kv_ratio", self.ratio, closed=False)
        if self.budget is not None:
            _check_int("kv_budget", self.budget, 1)


@accept_old_names
@dataclass(frozen=True)
class EngineConfig:
    """How the engine runs the model: devices, sizes, memory and numeric types.

    Raises:
        ValueError: a size lies outside its limits.
    """

    dtype: str = option(
        "float32",
        "Data type of the weights and of the KV cache. auto: float32 on CPU, bfloat16 on GPUs.",
        group=_MODEL,
        user_default="auto",
        choices=DTYPES,
    )
    quantization: str | None = option(
        None,
        "Weight quantization. int8: weight matrices take one byte per element.",
        group=_MODEL,
        choices=QUANTIZATIONS,
    )
    max_model_len: int = option(
        8192,
        "Maximum tokens of one request, prompt and output together.",
        group=_MODEL,
        user_default=None,
        default_text="the model's context length",
    )
    seed: int = option(
        0, "Random seed for the sampling of requests that give no seed.", group=_MODEL
    )
    tensor_parallel_size: int = option(1, "Number of devices that share the model.", group=_DEVICES)
    max_num_seqs: int = option(
        8,
        "Maximum number of requests that run at the same time, that is, rows of the decode batch.",
        group=_DEVICES,
        user_default=None,
        default_text="8 on CPU; on GPUs 256, or fewer if memory or the attention kernels need it",
    )
    kv_cache_bytes: int = option(
        1 << 30,
        "Size of the KV cache in bytes, summed over all devices; overrides gpu_memory_utilization.",
        name="kv_cache_memory_bytes",
        group=_DEVICES,
        user_default=None,
        default_text="1 GiB on CPU; on GPUs the memory that gpu_memory_utilization leaves",
    )
    page_size: int = option(
        16,
        "Tokens per page of the KV cache; a multiple of 8.",
        group=_DEVICES,
    )
    prefill_chunk_size: int = option(
        128,
        "Prompt tokens that are prefilled at a time, in one layer. Other requests may decode "
        "between two chunks.",
        group=_DEVICES,
        user_default=None,
        default_text="128 on CPU, 1024 on GPUs",
        old_name="prefill_block",
    )
    enable_prefix_caching: bool = option(
        False,
        "Keep compressed prefixes of prompts in the KV cache, so that requests can begin with "
        "them.",
        group=_DEVICES,
    )
    prefix_cache_fraction: float = option(
        0.5,
        "Fraction of the KV cache, in [0, 1], beyond which prefixes that no request uses are "
        "evicted.",
        group=_DEVICES,
    )
    attention_backend: str = option(
        "auto",
        "Implementation of decode attention: reference, triton or mosaic. auto: the fastest one "
        "for the device.",
        group=_DEVICES,
    )

    def __post_init__(self) -> None:
        for name in (
            "tensor_parallel_size",
            "max_num_seqs",
            "kv_cache_bytes",
            "prefill_chunk_size",
        ):
            _check_int(name, getattr(self, name), 1)
        _check_int("max_model_len", self.max_model_len, 2)
        _check_int("seed", self.seed, 0)
        if self.quantization is not None:
            _check_choice("quantization", self.quantization, QUANTIZATIONS)
        _check_bool("enable_prefix_caching", self.enable_prefix_caching)
        _check_fraction("prefix_cache_fraction", self.prefix_cache_fraction, closed=True)
        _check_int("page_size", self.page_size, 8)
        if self.page_size % 8:
            raise ValueError(f"page_size must be a multiple of 8, got {self.page_size}")


@accept_old_names
@dataclass(frozen=True)
class BuildOptions:
    """Options that are used only while an engine is built.

    Raises:
        ValueError: an option lies outside its limits.
    """

    model: Any = option(
        None,
        "Path of a checkpoint folder or of a GGUF file, name of a folder in checkpoints/, or "
        "OWNER/MODEL of the Hugging Face Hub.",
        group=_MODEL,
        type=str,
        default_text="the demo model, SmolLM2-135M-Instruct",
    )
    head_plan: Any = option(
        "fair_copying",
        "Assignment of KV heads to devices. static: contiguous blocks, as in plain tensor "
        "parallelism. best_effort: balanced by load, without replicas. fair_copying: balanced, "
        "with replicas of heavy heads. Otherwise, the path of a plan in JSON.",
        group=_DEVICES,
        type=str,
    )
    """A strategy, a path, or a `Plan`."""
    max_extra_replicas: int | None = option(
        None,
        "Maximum number of additional head replicas per layer, for fair_copying.",
        group=_DEVICES,
        default_text="no limit",
        old_name="max_copies",
    )
    gpu_memory_utilization: float = option(
        0.9,
        "Fraction of GPU memory for the weights and the KV cache, in (0, 1].",
        group=_DEVICES,
    )
    schedule_log: Any = option(
        None,
        "Path of a file in which every execution of the engine is logged as JSON lines. "
        "`python -m fairkv_jax.replay FILE` replays it. An existing file is overwritten.",
        group=_DEBUGGING,
        type=str,
    )
    """A path."""
    schedule_log_prompts: bool = option(
        False,
        "Include prompts and generated tokens in schedule_log. A replay then compares the tokens. "
        "Without them, it runs the same shapes with made-up tokens.",
        group=_DEBUGGING,
    )

    def __post_init__(self) -> None:
        value = self.gpu_memory_utilization
        if not isinstance(value, Real) or isinstance(value, bool) or not 0 < value <= 1:
            raise ValueError(f"gpu_memory_utilization must lie in (0, 1], got {value!r}")
        _check_bool("schedule_log_prompts", self.schedule_log_prompts)
        if not isinstance(self.schedule_log, str | os.PathLike | None):
            raise ValueError(f"schedule_log must be the path of a file, got {self.schedule_log!r}")
        if self.schedule_log_prompts and self.schedule_log is None:
            raise ValueError(
                "schedule_log_prompts needs schedule_log: give the path of the log, or leave out "
                "schedule_log_prompts"
            )


ENGINE_CLASSES = (BuildOptions, EngineConfig, KVConfig)
ENGINE_OPTIONS = options_of(*ENGINE_CLASSES)
"""Everything that `LLM` and `python -m fairkv_jax.serve` accept for the engine."""


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


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
