"""`python -m fairkv_jax.profile import`: published files become head scores and profiles."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from fairkv_jax.plan import HeadScores, Profile
from fairkv_jax.profile.__main__ import main

DUO = "0.9\t-0.001\n0.25\t0.5\n"
KEPT = np.array([[[10, 20], [30, 40]], [[14, 20], [30, 60]]], np.int32)


def convert(*arguments: object) -> int:
    return main(["import", *map(str, arguments)])


def test_duo_attention_becomes_head_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    table, output = tmp_path / "duo.tsv", tmp_path / "scores.json"
    table.write_text(DUO)
    assert convert(table, f"--output={output}", "--model=Some-7B", "--sinks=64") == 0
    assert capsys.readouterr().out == (
        f"duo_attention: 2 layers x 2 KV heads, written to {output}\n"
    )
    scores = HeadScores.from_json(output.read_text())
    assert scores.scores == ((0.9, -0.001), (0.25, 0.5))
    assert (scores.model, scores.method) == ("Some-7B", "duo_attention")
    assert (scores.sinks, scores.recent, scores.source) == (64, 256, "imported from duo.tsv")


@pytest.mark.parametrize("suffix", ["tsv", "json"])
def test_headkv_becomes_a_profile(tmp_path: Path, suffix: str):
    scores = tmp_path / f"headkv.{suffix}"
    if suffix == "tsv":
        scores.write_text("1\t3\t0\t0\n2\t0\t1\t1\n")
    else:
        values = {"0-0": [1], "0-1": [3], "0-2": [0], "0-3": [0]}
        values |= {"1-0": [1, 3], "1-1": [0], "1-2": [1], "1-3": [1]}
        scores.write_text(json.dumps(values))
    options = ("--num-kv-heads=2", "--kv-budget=108", "--beta=2", "--prompt-tokens=10000")
    output = tmp_path / "profile.json"
    assert convert(scores, *options, "--format=headkv", f"--output={output}") == 0
    profile = Profile.from_json(output.read_text())
    assert profile.array == pytest.approx(np.array([[158.0, 58.0], [108.0, 108.0]]))
    assert (profile.policy, profile.budget, profile.prompt_tokens) == ("headkv", 108, 10_000)


@pytest.mark.parametrize("arrays", [{"kept": KEPT}, {"raw_kept": KEPT[None], "other": KEPT}])
def test_retention_becomes_a_profile_with_samples(
    tmp_path: Path, arrays: dict, monkeypatch: pytest.MonkeyPatch
):
    np.savez(tmp_path / "kept.npz", **arrays)
    monkeypatch.chdir(tmp_path)
    assert convert("kept.npz", "--kv-policy=ada_snapkv") == 0
    profile = Profile.from_json((tmp_path / "profile.json").read_text())
    assert profile.tokens == ((12, 20), (30, 50))
    assert np.array(profile.samples).tolist() == KEPT.tolist()
    assert (profile.policy, profile.budget, profile.prompt_tokens) == ("ada_snapkv", 28, None)
    assert profile.correlation is not None


@pytest.mark.parametrize(
    ("width", "model", "format_"),
    [(8, "Llama-3-8B", "duo_attention"), (32, "Llama-3-8B", "headkv"), (8, "other", None)],
)
def test_a_known_model_tells_the_tables_apart(
    tmp_path: Path, width: int, model: str, format_: str | None, capsys: pytest.CaptureFixture[str]
):
    table = tmp_path / "scores.tsv"
    table.write_text(("\t".join(["0.5"] * width) + "\n") * 32)
    status = convert(table, f"--model={model}", f"--output={tmp_path / 'output.json'}")
    printed = capsys.readouterr()
    if format_ is None:
        assert status == 1
        assert "may be a table of DuoAttention or of HeadKV: say which by --format" in printed.err
    else:
        assert status == 0
        assert printed.out.startswith(f"{format_}: 32 layers x 8 KV heads")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"other": KEPT}, "holds neither kept nor raw_kept"),
        ({"kept": KEPT[0]}, r"kept tokens must be numbers [prompts, layers, KV heads], got int32"),
        ({"raw_kept": np.stack([KEPT, KEPT])}, "raw_kept must be [1, prompts, L, K]"),
        ({"kept": 0 * KEPT}, "it must be positive and finite"),
        ({"kept": np.array([{}])}, "is not an .npz file of arrays"),
    ],
)
def test_bad_retention_is_named(
    tmp_path: Path, arrays: dict, message: str, capsys: pytest.CaptureFixture[str]
):
    np.savez(tmp_path / "kept.npz", **arrays)
    assert convert(tmp_path / "kept.npz", f"--output={tmp_path / 'profile.json'}") == 1
    error = capsys.readouterr().err
    assert error.startswith("fairkv_jax.profile: ")
    assert message in error
    assert not (tmp_path / "profile.json").exists()


def test_wrong_arguments_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "duo.tsv").write_text(DUO)
    for arguments, message in (
        ([], "give one file to import, got none"),
        (["a", "b"], "give one file to import, got a b"),
        (["missing.tsv"], "No such file"),
        ([tmp_path / "text.npz"], "is not an .npz file of arrays"),
        ([tmp_path / "duo.tsv", "--format=headkv"], "is unknown: give it by --num-kv-heads"),
        ([tmp_path / "duo.tsv", "--format=other"], "--format=other: value should be one of"),
    ):
        assert convert(*arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith("fairkv_jax.profile: ")
        assert message in error


@pytest.mark.skipif(
    "FAIRKV_HEAD_SCORES" not in os.environ, reason="FAIRKV_HEAD_SCORES names no folder"
)
def test_published_tables_are_imported(tmp_path: Path):
    tables = sorted(Path(os.environ["FAIRKV_HEAD_SCORES"]).glob("duo*.tsv"))
    assert tables
    for table in tables:
        assert convert(table, "--format=duo_attention", f"--output={tmp_path / 'x.json'}") == 0
        scores = HeadScores.from_json((tmp_path / "x.json").read_text())
        scores.check_model(32, 32 if "Llama-2" in table.name else 8)


@pytest.mark.skipif(
    "FAIRKV_HEAD_PROFILES" not in os.environ, reason="FAIRKV_HEAD_PROFILES names no folder"
)
def test_published_profiles_are_imported(tmp_path: Path):
    files = sorted(Path(os.environ["FAIRKV_HEAD_PROFILES"]).glob("*.npz"))
    assert files
    for file in files:
        assert convert(file, f"--output={tmp_path / 'x.json'}") == 0
        profile = Profile.from_json((tmp_path / "x.json").read_text())
        assert profile.array == pytest.approx(np.load(file)["kept"].mean(0))
