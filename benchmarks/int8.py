"""Measures the error of the logits with int8 weights, and the memory that they save.

    python -m benchmarks.int8 --output benchmarks/results/int8

The distance of two models is |a - b| / |b| over the logits after all prompts.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from absl import app, flags

from fairkv_jax.command_line import engine_flag, with_underscores

_MODEL = engine_flag("model")
_PROMPTS = flags.DEFINE_integer("prompts", 24, "Number of prompts of benchmarks/prompts.jsonl.")
_TOKENS = flags.DEFINE_integer("tokens", 128, "Number of first tokens of each prompt to use.")
_OUTPUT = flags.DEFINE_string("output", None, "Path of the results, without .json and .md.")

VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "float32, int8 weights": {"dtype": "float32", "quantization": "int8"},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16, int8 weights": {"dtype": "bfloat16", "quantization": "int8"},
    "bfloat16 on 2 devices": {"dtype": "bfloat16", "tensor_parallel_size": 2},
}
PAIRS = [
    ("float32, int8 weights", "float32"),
    ("bfloat16", "float32"),
    ("bfloat16 on 2 devices", "bfloat16"),
    ("bfloat16, int8 weights", "bfloat16"),
]


def run(**options: Any) -> tuple[Any, int]:
    """Returns the logits [prompts, V] of one variant, and the bytes of its weights."""
    import jax
    import numpy as np

    from fairkv_jax import LLM
    from fairkv_jax.checkpoint.fetch import DEMO_MODEL
    from fairkv_jax.profile.prompts import read_prompts

    room, model = _TOKENS.value + 1, _MODEL.value or DEMO_MODEL
    llm = LLM(model, max_model_len=room, max_num_seqs=1, progress=False, **options)
    prompts = read_prompts("benchmarks/prompts.jsonl", llm.get_tokenizer(), _TOKENS.value)
    prompts = [ids[: _TOKENS.value] for ids in prompts[: _PROMPTS.value]]
    logits = [llm.prefill_logits(ids) for ids in prompts]
    leaves = jax.tree.leaves(llm.engine.runner.model)
    return np.array(logits, np.float64), sum(leaf.nbytes for leaf in leaves)


def table(results: dict[str, Any]) -> str:
    """Formats the results as Markdown."""
    options = results["flags"]
    lines = [
        "# Weights in int8",
        "",
        f"`python -m benchmarks.int8`: {options['model'] or 'the demo model'}, "
        f"{options['prompts']} prompts cut to {options['tokens']} tokens, on CPU devices.",
        "",
        "| model | compared with | distance of the logits |",
        "|---|---|---|",
    ]
    for one, other in PAIRS:
        lines.append(f"| {one} | {other} | {100 * results['distance'][f'{one} / {other}']:.2f} % |")
    sizes = results["bytes"]
    ratio = sizes["bfloat16, int8 weights"] / sizes["bfloat16"]
    lines += ["", f"The int8 weights take {ratio:.3f} times the bytes of the bfloat16 weights."]
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    device_count = "--xla_force_host_platform_device_count=2"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {device_count}"
    import numpy as np

    logits, sizes = {}, {}
    for name, options in VARIANTS.items():
        logits[name], sizes[name] = run(**options)
    norm = np.linalg.norm
    results = {
        "flags": {name: flags.FLAGS[name].value for name in ("model", "prompts", "tokens")},
        "distance": {
            f"{one} / {other}": float(norm(logits[one] - logits[other]) / norm(logits[other]))
            for one, other in PAIRS
        },
        "bytes": sizes,
    }
    print(table(results))
    if _OUTPUT.value:
        Path(f"{_OUTPUT.value}.json").write_text(json.dumps(results, indent=2) + "\n")
        Path(f"{_OUTPUT.value}.md").write_text(table(results))


if __name__ == "__main__":
    app.run(main, argv=[with_underscores(argument) for argument in sys.argv])
