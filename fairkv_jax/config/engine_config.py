"""How the engine runs a model, and how it is built."""

import os
from dataclasses import dataclass
from numbers import Real
from typing import Any

from fairkv_jax.config.checks import check_bool, check_choice, check_fraction, check_int
from fairkv_jax.options import accept_old_names, option

DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("int8",)
KV_CACHE_DTYPES = ("auto", "int8")

_MODEL = "Model"
_DEVICES = "Devices and memory"
_DEBUGGING = "Debugging"


@accept_old_names
@dataclass(frozen=True)
class EngineConfig:
    """How the engine runs the model: devices, sizes, memory and numeric types.

    Raises:
        ValueError: a size lies outside its limits.
    """

    dtype: str = option(
        "float32",
        "Data type of the weights and activations, and of the KV cache unless kv_cache_dtype names "
        "another. auto: float32 on CPU, bfloat16 on GPUs.",
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
    kv_cache_dtype: str = option(
        "auto",
        "Data type of the keys and values in the KV cache. auto: that of dtype. int8: one byte per "
        "element, and for each token and KV head a scale for its key and one for its value.",
        group=_DEVICES,
        choices=KV_CACHE_DTYPES,
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
    prefix_min_tokens: int = option(
        256,
        "Fewest tokens of a prompt's segment that is cached for other requests, where "
        "cache_control marks or the turns of a conversation divide a prompt. Shorter ones join "
        "the next.",
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
            "prefix_min_tokens",
        ):
            check_int(name, getattr(self, name), 1)
        check_int("max_model_len", self.max_model_len, 2)
        check_int("seed", self.seed, 0)
        if self.quantization is not None:
            check_choice("quantization", self.quantization, QUANTIZATIONS)
        check_choice("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        check_bool("enable_prefix_caching", self.enable_prefix_caching)
        check_fraction("prefix_cache_fraction", self.prefix_cache_fraction, closed=True)
        check_int("page_size", self.page_size, 8)
        if self.page_size % 8:
            raise ValueError(f"page_size must be a multiple of 8, got {self.page_size}")

    @property
    def page_dtype(self) -> str:
        """The type of the KV cache's pages."""
        return page_dtype(self.kv_cache_dtype, self.dtype)


def page_dtype(kv_cache_dtype: str, dtype: str) -> str:
    """Returns the type of the KV cache's pages, with which "auto" stands for that of the model."""
    return dtype if kv_cache_dtype == "auto" else kv_cache_dtype


@accept_old_names
@dataclass(frozen=True)
class BuildOptions:
    """Options that are used only while an engine is built.

    Raises:
        ValueError: an option lies outside its limits.
    """

    model: Any = option(
        None,
        "Path of a checkpoint folder or of a GGUF file, name of a folder in download_dir, or "
        "OWNER/MODEL of the Hugging Face Hub.",
        group=_MODEL,
        type=str,
        default_text="the demo model, SmolLM2-135M-Instruct",
    )
    download_dir: str | None = option(
        None,
        "Folder into which models are fetched.",
        group=_MODEL,
        default_text="checkpoints/ in a source tree, otherwise ~/.cache/fairkv_jax/checkpoints",
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
        check_bool("schedule_log_prompts", self.schedule_log_prompts)
        if not isinstance(self.schedule_log, str | os.PathLike | None):
            raise ValueError(f"schedule_log must be the path of a file, got {self.schedule_log!r}")
        if self.schedule_log_prompts and self.schedule_log is None:
            raise ValueError(
                "schedule_log_prompts needs schedule_log: give the path of the log, or leave out "
                "schedule_log_prompts"
            )
