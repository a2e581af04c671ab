"""`python -m fairkv_jax.profile`: its flags reach the engine, also under deprecated names."""

import subprocess
import sys
from pathlib import Path

from fairkv_jax.plan import Profile

ROOT = Path(__file__).parents[2]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fairkv_jax.profile", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_profile_is_measured_with_the_given_options(tiny_checkpoint: Path, tmp_path: Path):
    prompts, output = tmp_path / "prompts.txt", tmp_path / "profile.json"
    prompts.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    given = run(
        *(f"--model={tiny_checkpoint}", f"--prompts={prompts}", f"--output={output}"),
        *("--prompt-tokens=64", "--kv-policy=snapkv", "--kv-budget=40", "--kv-floor", "reserve"),
    )
    assert given.returncode == 0, given.stderr
    assert "--kv-floor is deprecated and will be removed" in given.stderr
    profile = Profile.from_json(output.read_text())
    assert (profile.policy, profile.budget) == ("snapkv", 40)
    assert profile.tokens == ((40.0,) * 3,) * 2


def test_an_option_under_both_names_is_an_error():
    given = run("--prompts=none.txt", "--kv-alpha=0.1", "--kv-alpha-safeguard=0.2")
    assert given.returncode == 1
    assert given.stderr.endswith(
        "fairkv_jax.profile: --kv-alpha is the deprecated name of --kv-alpha-safeguard: "
        "give --kv-alpha-safeguard only\n"
    )
