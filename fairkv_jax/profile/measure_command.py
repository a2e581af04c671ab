"""`python -m fairkv_jax.profile measure`: measures a head profile on prompts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fairkv_jax.command_line import engine_options, help_page, read_flags
from fairkv_jax.compress.budgets import num_kept_tokens
from fairkv_jax.config import KVConfig
from fairkv_jax.options import option, options_of

_USAGE = """\
usage: python -m fairkv_jax.profile [measure] --prompts FILE [--option value ...]

Prefills prompts, records how many of their tokens every KV head keeps, and writes a head profile.
An interrupted measurement goes on where it stopped if it is started again."""
_MEASUREMENT = "Measurement"


@dataclass(frozen=True)
class MeasureOptions:
    """What is measured, besides the options of the engine."""

    prompts: str | None = option(
        None,
        "Path of a text file, or of a .jsonl file whose objects have the key prompt or messages.",
        group=_MEASUREMENT,
        default_text="required",
    )
    prompt_tokens: int = option(
        1024, "Tokens per prompt into which a text file is split.", group=_MEASUREMENT
    )
    output: str = option("profile.json", "Path of the profile to write.", group=_MEASUREMENT)
    devices: int = option(
        2, "Number of devices for the utilization on held-out prompts.", group=_MEASUREMENT
    )


_ENGINE = tuple(
    replace(each, default="ada_snapkv") if each.name == "kv_policy" else each
    for each in (*engine_options("model", "download_dir", "dtype"), *options_of(KVConfig))
)
OPTIONS = (*options_of(MeasureOptions), *_ENGINE)


def main(arguments: Sequence[str]) -> None:
    """Measures the profile, prints a summary, and writes the profile.

    Raises:
        ValueError: an argument is wrong.
        OSError: a file cannot be read or written.
    """
    given, rest = read_flags(arguments, OPTIONS)
    if given["help"]:
        print(help_page(_USAGE, OPTIONS))
        return
    if rest:
        raise ValueError(f"unexpected argument {rest[0]!r}: options begin with --")
    if given["prompts"] is None:
        raise ValueError("--prompts is required: give a text file or a .jsonl file")
    options = MeasureOptions(
        **{each.field: given[each.name] for each in options_of(MeasureOptions)}
    )
    _measure(options, {each.name: given[each.name] for each in _ENGINE})


def _measure(options: MeasureOptions, for_engine: dict[str, Any]) -> None:
    from fairkv_jax.engine.build import build_engine
    from fairkv_jax.profile.measure import make_profile, measure_lengths
    from fairkv_jax.profile.prompts import read_prompts

    built = build_engine(max_num_seqs=1, **for_engine)
    prompts = read_prompts(str(options.prompts), built.tokenizer, options.prompt_tokens)
    longest = built.engine_config.max_model_len
    for number, prompt in enumerate(prompts):
        if len(prompt) > longest:
            raise ValueError(
                f"prompt {number} has {len(prompt)} tokens, but the model's context has {longest}: "
                "shorten it, or lower --prompt-tokens"
            )
    kept_whole = sum(num_kept_tokens(built.kv_config, len(p)) >= len(p) for p in prompts)
    if kept_whole:
        print(f"{kept_whole} of {len(prompts)} prompts are within the budget and are kept whole")
    output = Path(options.output)
    log = output.with_name(output.name + ".partial")
    lengths = measure_lengths(built.runner, prompts, log)
    profile = make_profile(built.runner, built.model_name, prompts, lengths, options.devices)
    output.write_text(profile.to_json(), encoding="utf-8")
    log.unlink()
    spread = profile.array.std(1) / profile.array.mean(1)
    print(f"{len(prompts)} prompts, tokens kept per head: mean {profile.array.mean():.1f}")
    print(f"imbalance of heads within a layer (std / mean): {spread.mean():.3f}")
    if profile.correlation is not None:
        print(f"correlation between prompts: {profile.correlation:.3f}")
    for name, value in profile.held_out:
        print(f"utilization on held-out prompts, {name} devices: {value:.3f}")
    print(f"profile written to {output}")
