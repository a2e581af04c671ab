"""How many rows fit beside a document that they share, counted and by arithmetic.

    python -m benchmarks.prefix_rows

It runs on the host only: a `KVCacheManager` of the size that an engine would make is filled with
rows until it refuses one. Every row begins with the document and appends a question and an answer.
"""

import sys
from dataclasses import dataclass

import numpy as np
from absl import app, flags

from fairkv_jax.command_line import with_underscores
from fairkv_jax.config import EngineConfig, ModelConfig
from fairkv_jax.engine.cache_size import size_cache
from fairkv_jax.engine.kv_cache_manager import KVCacheManager
from fairkv_jax.engine.prefix_pages import PrefixPages
from fairkv_jax.kv_cache_spec import KVCacheSpec
from fairkv_jax.plan import Profile, make_plan
from fairkv_jax.sharding.slots import SlotLayout

RATIOS = (0.0, 0.5, 0.8)
NUM_ROWS = 2048
MODEL = ModelConfig(
    architecture="llama",
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_position_embeddings=131_072,
    rope_theta=500_000.0,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
)
"""The shape of Llama-3.1-8B."""


@dataclass(frozen=True)
class Fit:
    """The rows that fit, and what limits them."""

    counted: int
    by_pages: int
    """As many as have pages: those of the document are held once."""
    by_tables: int
    """As many as the page tables can list: pages of the document are listed for every row."""
    not_shared: int
    """As many as have pages if each row holds the document itself."""


def fit(spec: KVCacheSpec, layout: SlotLayout, kept: int, appended: int) -> Fit:
    """Fills the cache with rows that share `kept` tokens per head and append `appended` more."""
    manager = KVCacheManager(spec, layout)
    lengths = np.full((spec.num_layers, layout.num_heads), kept)
    assert manager.reserve_prompt(0, lengths) is not None, "the document does not fit"
    document, counted = manager.retain(0), 0
    manager.free(0)
    while counted < spec.num_rows and _add_row(manager, counted, document, appended):
        counted += 1
    heads, page = spec.num_layers * layout.num_heads, spec.page_size
    most = appended + 1  # a row is given pages only if one more token fits as well
    of_document, listed = heads * -(-kept // page), heads * -(-(kept + most) // page)
    own = listed - heads * (kept // page)
    return Fit(
        counted,
        (spec.pages_per_device - of_document) // own,
        spec.max_listed_pages // listed,
        spec.pages_per_device // listed,
    )


def _add_row(manager: KVCacheManager, row: int, document: PrefixPages, appended: int) -> bool:
    if manager.share(row, document) is None:
        return False
    suffix = np.full((manager.spec.num_layers, MODEL.num_kv_heads), appended)
    return manager.reserve_suffix(row, suffix) is not None


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}: options begin with --")
    tokens, appended = _TOKENS.value, _QUESTION.value + _ANSWER.value
    config = EngineConfig(
        dtype="bfloat16",
        max_model_len=tokens + appended + 1,
        max_num_seqs=NUM_ROWS,
        kv_cache_bytes=int(_GIB.value * 2**30),
        enable_prefix_caching=True,
    )
    profile = Profile("", "full", None, ((1.0,) * MODEL.num_kv_heads,) * MODEL.num_layers)
    layout = SlotLayout.from_plan(make_plan(profile, 1, "static"))
    spec = size_cache(config, MODEL, layout)
    print(
        f"Llama-3.1-8B in bfloat16, a KV cache of {_GIB.value:g} GiB on one device "
        f"({spec.pages_per_device:,} pages), a document of {tokens:,} tokens, and "
        f"{appended} tokens more in every row\n\n"
        "kv_ratio | kept per head | rows that fit | by pages | by page tables | not shared\n"
        "---|---|---|---|---|---"
    )
    for ratio in RATIOS:
        kept = max(1, int(tokens * (1 - ratio)))
        found = fit(spec, layout, kept, appended)
        print(
            f"{ratio} | {kept:,} | **{found.counted}** | {found.by_pages} | {found.by_tables} | "
            f"{found.not_shared}"
        )
        assert found.counted == min(found.by_pages, found.by_tables), "the arithmetic is wrong"


if __name__ == "__main__":
    _TOKENS = flags.DEFINE_integer("tokens", 8000, "Tokens of the document.")
    _QUESTION = flags.DEFINE_integer("question", 60, "Tokens of each question.")
    _ANSWER = flags.DEFINE_integer("answer", 200, "Tokens of each answer.")
    _GIB = flags.DEFINE_float("gib", 20.0, "Size of the KV cache in GiB.")
    app.run(main, argv=[with_underscores(argument) for argument in sys.argv])
