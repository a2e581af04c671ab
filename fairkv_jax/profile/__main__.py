"""`python -m fairkv_jax.profile`: measure how many tokens every KV head keeps, over prompts."""

import sys
from pathlib import Path

from absl import app, flags

from fairkv_jax.command_line import with_underscores
from fairkv_jax.compress.budgets import num_kept_tokens
from fairkv_jax.config import FLOORS, POOLS, KVConfig

_MODEL = flags.DEFINE_string("model", None, "checkpoint; default: the demo checkpoint")
_PROMPTS = flags.DEFINE_string("prompts", None, "a text, or .jsonl with `prompt` or `messages`")
_PROMPT_TOKENS = flags.DEFINE_integer("prompt_tokens", 1024, "length of the pieces of a text")
_OUTPUT = flags.DEFINE_string("output", "profile.json", "where to write the profile")
flags.mark_flag_as_required("prompts")
_DEVICES = flags.DEFINE_integer("devices", 2, "for the utilisation on prompts left out")
_DTYPE = flags.DEFINE_string("dtype", "auto", "of weights and cache")
_KV = {
    "kv_policy": flags.DEFINE_string("kv_policy", "ada_snapkv", "what is measured"),
    "kv_budget": flags.DEFINE_integer("kv_budget", None, "kept tokens a head on average"),
    "kv_ratio": flags.DEFINE_float("kv_ratio", None, "instead: the fraction removed"),
    "kv_window": flags.DEFINE_integer("kv_window", KVConfig.window, "last tokens, always kept"),
    "kv_pool": flags.DEFINE_enum("kv_pool", KVConfig.pool, POOLS, "pooling of the scores"),
    "kv_kernel": flags.DEFINE_integer("kv_kernel", KVConfig.kernel, "its width, odd"),
    "kv_pool_first": flags.DEFINE_bool(
        "kv_pool_first", KVConfig.pool_first, "pool before the mean over query heads"
    ),
    "kv_floor": flags.DEFINE_enum("kv_floor", KVConfig.floor, FLOORS, "of ada_snapkv"),
    "kv_alpha": flags.DEFINE_float("kv_alpha", KVConfig.alpha, "protected part of a budget"),
}


def main(argv: list[str]) -> int:
    """Measures, prints a summary, writes the profile."""
    if len(argv) > 1:
        raise app.UsageError(f"{argv[1]!r} is not understood: options begin with --")
    try:
        _measure()
    except (ValueError, OSError) as error:
        print(f"fairkv_jax.profile: {error}", file=sys.stderr)
        return 1
    return 0


def _measure() -> None:
    from fairkv_jax.checkpoint.fetch import DEMO_MODEL
    from fairkv_jax.engine.build import build_engine
    from fairkv_jax.profile.measure import make_profile, measure_lengths
    from fairkv_jax.profile.prompts import read_prompts

    built = build_engine(
        _MODEL.value or DEMO_MODEL,
        dtype=_DTYPE.value,
        max_num_seqs=1,
        **{name: flag.value for name, flag in _KV.items()},
    )
    prompts = read_prompts(str(_PROMPTS.value), built.tokenizer, _PROMPT_TOKENS.value)
    longest = built.engine_config.max_model_len
    for number, prompt in enumerate(prompts):
        if len(prompt) > longest:
            raise ValueError(f"prompt {number} has {len(prompt)} tokens, the context is {longest}")
    kept_whole = sum(num_kept_tokens(built.kv_config, len(p)) >= len(p) for p in prompts)
    if kept_whole:
        print(f"{kept_whole} of {len(prompts)} prompts are no longer than the budget: kept whole")
    output = Path(str(_OUTPUT.value))
    log = output.with_name(output.name + ".partial")
    lengths = measure_lengths(built.engine, prompts, log)
    profile = make_profile(built.engine, built.model_name, prompts, lengths, _DEVICES.value)
    output.write_text(profile.to_json(), encoding="utf-8")
    log.unlink()
    spread = profile.array.std(1) / profile.array.mean(1)
    print(f"{len(prompts)} prompts, kept tokens a head: mean {profile.array.mean():.1f}")
    print(f"imbalance of a layer's heads (std / mean): {spread.mean():.3f}")
    if profile.correlation is not None:
        print(f"correlation between prompts: {profile.correlation:.3f}")
    for name, value in profile.held_out:
        print(f"utilisation on prompts left out, {name} devices: {value:.3f}")
    print(f"written: {output}")


if __name__ == "__main__":
    app.run(main, argv=[with_underscores(argument) for argument in sys.argv])
