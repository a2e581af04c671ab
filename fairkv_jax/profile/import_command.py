"""`python -m fairkv_jax.profile import`: converts published head scores and profiles."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fairkv_jax.checkpoint.base import HEAD_SCORES_FILE, PROFILE_FILE
from fairkv_jax.command_line import help_page, read_flags
from fairkv_jax.options import option, options_of
from fairkv_jax.plan import HeadScores, Profile, find_shape
from fairkv_jax.profile.published import (
    from_headkv,
    from_retention,
    guess_format,
    read_headkv_json,
    read_retention,
    read_table,
)

FORMATS = ("duo_attention", "headkv", "retention")
_USAGE = """\
usage: python -m fairkv_jax.profile import FILE [--option value ...]

Converts a published file to the formats of this project:

  duo_attention  scores of DuoAttention, a table (TSV) of layers x KV heads -> head scores
  headkv         scores of HeadKV, a table (TSV) of layers x query heads, or JSON -> head profile
  retention      kept tokens, an .npz file with kept [prompts, layers, KV heads], or raw_kept with
                 an axis before these, as Tangram writes it -> head profile"""
_ALL, _DUO, _PROFILE, _HEADKV = "File", "duo_attention", "headkv and retention", "headkv"


@dataclass(frozen=True)
class ImportOptions:
    """What a file is, and what the result says about it."""

    format: str | None = option(
        None,
        "Format of the file.",
        group=_ALL,
        choices=FORMATS,
        default_text="guessed from the file, if only one format is possible",
    )
    model: str = option(
        "", "Name of the model that the file belongs to.", group=_ALL, default_text="unnamed"
    )
    output: str | None = option(
        None,
        "Path of the JSON file to write.",
        group=_ALL,
        default_text=f"{HEAD_SCORES_FILE} or {PROFILE_FILE}",
    )
    sinks: int = option(
        128, "First tokens that heads of low scores kept during the training.", group=_DUO
    )
    recent: int = option(
        256, "Most recent tokens that heads of low scores kept during the training.", group=_DUO
    )
    policy: str | None = option(
        None,
        "Compression policy that the profile is for. A profile beside the weights is used with "
        "this kv_policy only.",
        name="kv_policy",
        group=_PROFILE,
        default_text="the format's name",
    )
    prompt_tokens: int | None = option(
        None,
        "Length of the prompts in tokens; headkv distributes its budget for this length.",
        group=_PROFILE,
        default_text="8192 for headkv, unknown for retention",
    )
    budget: int = option(
        1024,
        "Tokens kept per head, averaged over all heads, including the window.",
        name="kv_budget",
        group=_HEADKV,
    )
    window: int = option(
        8, "Most recent tokens that every head keeps.", name="kv_window", group=_HEADKV
    )
    beta: float = option(
        1.2,
        "Every head gives 1 / beta of its budget to the pool that is distributed by the scores.",
        group=_HEADKV,
    )
    num_kv_heads: int | None = option(
        None, "Number of KV heads of the model.", group=_HEADKV, default_text="known from the model"
    )


OPTIONS = options_of(ImportOptions)


def main(arguments: Sequence[str]) -> None:
    """Converts one file and writes the result.

    Raises:
        ValueError: an argument is wrong, or the file has another format.
        OSError: a file cannot be read or written.
    """
    given, files = read_flags(arguments, OPTIONS)
    if given["help"]:
        print(help_page(_USAGE, OPTIONS))
        return
    if len(files) != 1:
        raise ValueError(f"give one file to import, got {' '.join(files) or 'none'}")
    options = ImportOptions(**{each.field: given[each.name] for each in OPTIONS})
    path = Path(files[0])
    format_ = options.format or guess_format(path, find_shape(options.model))
    if format_ == "duo_attention":
        result, name = _head_scores(path, options), HEAD_SCORES_FILE
        heads = f"{len(result.scores)} layers x {len(result.scores[0])} KV heads"
    else:
        convert = {"headkv": _headkv_profile, "retention": _retention_profile}[format_]
        result, name = convert(path, options), PROFILE_FILE
        heads = f"{result.num_layers} layers x {result.num_heads} KV heads"
        heads += f", {result.array.mean():.1f} tokens per head"
    output = Path(options.output or name)
    output.write_text(result.to_json(), encoding="utf-8")
    print(f"{format_}: {heads}, written to {output}")


def _head_scores(path: Path, options: ImportOptions) -> HeadScores:
    return HeadScores(
        model=options.model,
        method="duo_attention",
        scores=read_table(path).tolist(),
        sinks=options.sinks,
        recent=options.recent,
        source=f"imported from {path.name}",
    )


def _headkv_profile(path: Path, options: ImportOptions) -> Profile:
    scores = read_headkv_json(path) if path.suffix == ".json" else read_table(path)
    shape = find_shape(options.model)
    num_kv_heads = options.num_kv_heads or (shape and shape.num_kv_heads)
    if not num_kv_heads:
        raise ValueError(
            f"the number of KV heads of {options.model or 'an unnamed model'} is unknown: give it "
            "by --num-kv-heads"
        )
    return from_headkv(
        scores,
        num_kv_heads=num_kv_heads,
        budget=options.budget,
        prompt_tokens=options.prompt_tokens or 8192,
        model=options.model,
        policy=options.policy or "headkv",
        window=options.window,
        beta=options.beta,
    )


def _retention_profile(path: Path, options: ImportOptions) -> Profile:
    return from_retention(
        read_retention(path),
        model=options.model,
        policy=options.policy or "retention",
        prompt_tokens=options.prompt_tokens,
        source=f"imported from {path.name}",
    )
