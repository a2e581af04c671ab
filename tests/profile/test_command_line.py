"""`python -m fairkv_jax.profile`: its commands, and flags that reach the engine."""

import subprocess
import sys
from pathlib import Path

import pytest

from fairkv_jax.plan import HeadScores, Profile

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


def test_head_scores_are_learned_on_two_devices(tiny_checkpoint: Path, tmp_path: Path):
    output = tmp_path / "scores.json"
    options = ("--num-contexts=1", "--context_tokens=480", "--tensor-parallel-size=2")
    given = run("learn", f"--model={tiny_checkpoint}", f"--output={output}", *options)
    assert given.returncode == 0, given.stderr
    assert "highest scores, as layer.head: " in given.stdout
    assert "warning: the model seldom repeats what the texts say" in given.stdout
    scores = HeadScores.from_json(output.read_text())
    scores.check_model(2, 3)
    assert "--num-contexts=1" in scores.source
    assert "1 contexts of 480 tokens" in scores.source


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ((), "--prompts"),
        (("measure",), "--kv-budget"),
        (("learn",), "--l1"),
        (("import",), "--beta"),
    ],
)
def test_every_command_has_a_help_page(command: tuple[str, ...], option: str):
    given = run(*command, "--help")
    assert given.returncode == 0
    assert f"  {option} " in given.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--prompts is required"),
        (("learn", "model"), "unexpected argument 'model': options begin with --"),
        (("learn", "--unknown"), "Unknown command line flag 'unknown'"),
        (("learn", "--output=missing/x.json"), "there is no folder missing: create it first"),
        (("learn", "--tensor-parallel-size=0"), "--tensor-parallel-size must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple[str, ...], message: str):
    given = run(*arguments)
    assert given.returncode == 1
    assert given.stderr.startswith("fairkv_jax.profile: ")
    assert message in given.stderr
