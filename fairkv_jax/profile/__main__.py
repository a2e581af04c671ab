"""`python -m fairkv_jax.profile`: measures the number of prompt tokens kept per KV head."""

import sys
from pathlib import Path

from absl import app, flags

from fairkv_jax.command_line import engine_flag, normalise
from fairkv_jax.compress.budgets import num_kept_tokens
from fairkv_jax.config import ENGINE_OPTIONS, KVConfig
from fairkv_jax.options import options_of

_PROMPTS = flags.DEFINE_string(
    "prompts",
    None,
    "Path of a text file, or of a .jsonl file whose objects have the key prompt or messages.",
    required=True,
)
_PROMPT_TOKENS = flags.DEFINE_integer(
    "prompt_tokens", 1024, "Tokens per prompt into which a text file is split."
)
_OUTPUT = flags.DEFINE_string("output", "profile.json", "Path of the profile to write.")
_DEVICES = flags.DEFINE_integer(
    "devices", 2, "Number of devices for the utilization on held-out prompts."
)
_ENGINE = {
    "model": engine_flag("model"),
    "dtype": engine_flag("dtype"),
    "kv_policy": engine_flag("kv_policy", default="ada_snapkv"),
    **{
        option.name: engine_flag(option.name)
        for option in options_of(KVConfig)
        if option.name != "kv_policy"
    },
}


def main(argv: list[str]) -> int:
    """Measures the profile, prints a summary, and writes the profile."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}: options begin with --")
    try:
        _measure()
    except (ValueError, OSError) as error:
        print(f"fairkv_jax.profile: {error}", file=sys.stderr)
        return 1
    return 0


def _measure() -> None:
    from fairkv_jax.engine.build import build_engine
    from fairkv_jax.profile.measure import make_profile, measure_lengths
    from fairkv_jax.profile.prompts import read_prompts

    built = build_engine(max_num_seqs=1, **{name: flag.value for name, flag in _ENGINE.items()})
    prompts = read_prompts(str(_PROMPTS.value), built.tokenizer, _PROMPT_TOKENS.value)
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
    output = Path(str(_OUTPUT.value))
    log = output.with_name(output.name + ".partial")
    lengths = measure_lengths(built.runner, prompts, log)
    profile = make_profile(built.runner, built.model_name, prompts, lengths, _DEVICES.value)
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


if __name__ == "__main__":
    try:
        arguments = normalise(sys.argv, ENGINE_OPTIONS)
    except ValueError as error:
        sys.exit(f"fairkv_jax.profile: {error}")
    app.run(main, argv=arguments)
