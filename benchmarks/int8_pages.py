"""Measures what int8 pages cost in likelihood, beside pages in floating point, on a text.

    python -m benchmarks.int8_pages --text /usr/share/common-licenses/GPL-3 \\
        --output benchmarks/results/int8_pages

The context of each passage is cached whole, and compressed; the next 96 tokens are scored over the
cache. All figures are in nats per token, means over the passages with Student's 95 % intervals. The
divergence is that from the whole context in floating point.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from absl import app, flags

from fairkv_jax.command_line import engine_flag, with_underscores
from fairkv_jax.config import KV_CACHE_DTYPES
from fairkv_jax.evaluate.haystack import read_text
from fairkv_jax.evaluate.statistics import Estimate, student
from fairkv_jax.kv_cache_spec import token_bytes

_MODEL = engine_flag("model")
_DTYPE = engine_flag("dtype", default="float32")
_POLICY = engine_flag("kv_policy", default="duo_attention")
_RATIO = engine_flag("kv_ratio", default=0.8)
_TEXT = flags.DEFINE_string("text", None, "Path of an English text.", required=True)
_LENGTH = flags.DEFINE_integer("length", 1000, "Tokens of each context.")
_PASSAGES = flags.DEFINE_integer("passages", 10, "Number of passages.")
_OUTPUT = flags.DEFINE_string("output", None, "Path of the results, without .json and .md.")


def measure(kv_cache_dtype: str, full: list[Any]) -> tuple[dict[str, list[Any]], int]:
    """Returns NLL and KL of every passage, kept whole and compressed, and the bytes of a token.

    `full` holds the logits over whole contexts in floating point; where it is empty, these are
    measured now, and added to it.
    """
    from fairkv_jax import LLM
    from fairkv_jax.evaluate.likelihood import LikelihoodMeter, kl
    from fairkv_jax.evaluate.user_data import SCORED_TOKENS, passages

    llm = LLM(
        _MODEL.value,
        dtype=_DTYPE.value,
        kv_policy=_POLICY.value,
        kv_ratio=_RATIO.value,
        kv_cache_dtype=kv_cache_dtype,
        max_model_len=_LENGTH.value + SCORED_TOKENS + 1,
        max_num_seqs=1,
        progress=False,
    )
    text = llm.get_tokenizer().encode(read_text(_TEXT.value, "--text"))
    runner, found = llm.engine.runner, {"whole": [], "compressed": []}
    for sample, passage in enumerate(passages(text, _LENGTH.value, _PASSAGES.value)):
        meter = LikelihoodMeter(runner, passage)
        for name, ratio in (("whole", None), ("compressed", _RATIO.value)):
            logits, _ = meter.logits(ratio)
            if sample == len(full):
                full.append(logits)
            found[name].append((meter.nll(logits), kl(full[sample], logits)))
    spec, config = runner.cache_spec, runner.model_config
    return found, token_bytes(spec.head_dim, spec.dtype) * config.num_layers * config.num_kv_heads


def table(results: dict[str, Any]) -> str:
    """Formats the results as Markdown."""
    options, measured, num_bytes = (results[key] for key in ("flags", "nats", "token_bytes"))
    lines = [
        "# Keys and values in int8",
        "",
        f"`python -m benchmarks.int8_pages`, {options['passages']} passages of "
        f"{options['length']} tokens, `{options['kv_policy']}` at `kv_ratio` "
        f"{options['kv_ratio']}, model in {options['dtype']}. Nats per token.",
        "",
        "| context | pages | bytes per token | NLL | NLL less that in floats | KL from full |",
        "|---|---|---|---|---|---|",
    ]
    for name in ("whole", "compressed"):
        floats = [nll for nll, _ in measured["auto"][name]]
        for dtype, by_name in measured.items():
            nll, kl = zip(*by_name[name], strict=True)
            less = [a - b for a, b in zip(nll, floats, strict=True)]
            cells = [name, dtype, f"{num_bytes[dtype]:,}", f"{student(nll).mean:.4f}"]
            cells.append("" if dtype == "auto" else _said(student(less)))
            cells.append("0" if not any(kl) else _said(student(kl)))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _said(estimate: Estimate) -> str:
    return f"{estimate.mean:.5f} ({estimate.low:.5f} to {estimate.high:.5f})"


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    names = ("dtype", "kv_policy", "kv_ratio", "length", "passages")
    results: dict[str, Any] = {"flags": {name: flags.FLAGS[name].value for name in names}}
    results |= {"nats": {}, "token_bytes": {}}
    full: list[Any] = []
    for dtype in KV_CACHE_DTYPES:
        results["nats"][dtype], results["token_bytes"][dtype] = measure(dtype, full)
    print(table(results))
    if _OUTPUT.value:
        Path(f"{_OUTPUT.value}.json").write_text(json.dumps(results, indent=1) + "\n")
        Path(f"{_OUTPUT.value}.md").write_text(table(results))


if __name__ == "__main__":
    app.run(main, [with_underscores(argument) for argument in sys.argv])
