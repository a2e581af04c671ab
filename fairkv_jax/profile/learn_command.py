"""`python -m fairkv_jax.profile learn`: learns head scores from a model."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fairkv_jax.checkpoint import open_checkpoint
from fairkv_jax.checkpoint.base import HEAD_SCORES_FILE
from fairkv_jax.checkpoint.fetch import DEMO_MODEL
from fairkv_jax.command_line import engine_options, help_page, make_cpu_devices, read_flags
from fairkv_jax.options import option, options_of
from fairkv_jax.plan import HeadScores
from fairkv_jax.profile.learn_config import LearnConfig

_PROGRAM = "python -m fairkv_jax.profile learn"
_USAGE = f"""\
usage: {_PROGRAM} [--option value ...]

Learns a score for every KV head: how much the head needs whole prompts. Facts are planted in texts,
and the model repeats them. A file {HEAD_SCORES_FILE} beside a model's weights is found by the
policies that rank heads by their scores."""
_RELIABLE = 0.7
"""Scores of a model that repeats fewer of its answers' tokens deserve a warning."""
_TOP = 10


@dataclass(frozen=True)
class _Files:
    output: str = option(
        HEAD_SCORES_FILE, "Path of the head scores (JSON) to write.", group="Output"
    )


_ENGINE = engine_options("model", "download_dir", "dtype", "quantization", "tensor_parallel_size")
OPTIONS = (*options_of(LearnConfig, _Files), *_ENGINE)


def main(arguments: Sequence[str]) -> None:
    """Learns the scores, prints a summary, and writes the scores.

    Raises:
        ValueError: an argument is wrong, or does not suit the model.
        OSError: a file cannot be read or written.
    """
    given, rest = read_flags(arguments, OPTIONS)
    if given["help"]:
        print(help_page(_USAGE, OPTIONS))
        return
    if rest:
        raise ValueError(f"unexpected argument {rest[0]!r}: options begin with --")
    config = LearnConfig(**{each.field: given[each.name] for each in options_of(LearnConfig)})
    output = Path(given["output"])
    if not output.parent.is_dir():
        raise ValueError(f"--output {output}: there is no folder {output.parent}: create it first")
    scores, accuracy = _learn(config, given, _source(arguments, config))
    output.write_text(scores.to_json(), encoding="utf-8")
    print("\n".join(summary(scores, accuracy)))
    print(f"head scores written to {output}")


def _learn(config: LearnConfig, given: dict[str, Any], source: str) -> tuple[HeadScores, float]:
    num_devices = given["tensor_parallel_size"]
    if num_devices < 1:
        raise ValueError(f"--tensor-parallel-size must be at least 1, got {num_devices}")
    make_cpu_devices(num_devices)
    # These modules import JAX, which reads the environment variable set above.
    import jax

    from fairkv_jax.engine.build import resolved_dtype
    from fairkv_jax.profile.learn import learn_head_scores

    return learn_head_scores(
        open_checkpoint(given["model"] or DEMO_MODEL, given["download_dir"]),
        config,
        dtype=resolved_dtype(given["dtype"], jax.default_backend()),
        num_devices=num_devices,
        int8=given["quantization"] == "int8",
        source=source,
    )


def _source(arguments: Sequence[str], config: LearnConfig) -> str:
    """Returns the command, and what its defaults stood for."""
    texts = config.haystack
    if texts is None:
        texts = f"the language reference of Python {sys.version_info[0]}.{sys.version_info[1]}"
    command = shlex.join([*_PROGRAM.split(), *arguments])
    return (
        f"{command} ({config.num_contexts} contexts of {config.context_tokens} tokens from "
        f"{texts}, seed {config.seed})"
    )


def summary(scores: HeadScores, accuracy: float) -> list[str]:
    """Returns lines that describe learned scores: the best heads, and how to read them."""
    table = scores.array
    order = np.argsort(-table, axis=None, kind="stable")
    tops = [divmod(int(index), table.shape[1]) for index in order[:_TOP]]
    heads = ", ".join(f"{layer}.{head} ({table[layer, head]:.2f})" for layer, head in tops)
    lines = [
        f"{scores.model}: {table.shape[0]} layers x {table.shape[1]} KV heads, "
        f"method {scores.method}",
        f"highest scores, as layer.head: {heads}",
        f"median score {np.median(table):.3f}",
        f"the model predicts {accuracy:.0%} of the answers' tokens",
    ]
    if accuracy < _RELIABLE:
        lines.append(
            "warning: the model seldom repeats what the texts say, so the scores mean little: "
            "try shorter contexts (--context-tokens)"
        )
    return lines
