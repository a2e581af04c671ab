"""Measuring a profile on a tiny model: what is recorded, resumed, and refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from fairkv_jax.engine.build import build_engine
from fairkv_jax.engine.llm_engine import LLMEngine
from fairkv_jax.plan import Profile
from fairkv_jax.profile.measure import make_profile, measure_lengths
from fairkv_jax.profile.prompts import read_prompts

TEXT = "the one and then in a well, her hand on the reel and her hair in the wind "


@pytest.fixture(scope="module")
def built(tiny_checkpoint: Path) -> LLMEngine:
    return build_engine(
        tiny_checkpoint,
        max_num_seqs=1,
        max_model_len=256,
        kv_policy="ada_snapkv",
        kv_budget=24,
        kv_window=8,
        progress=False,
    )


def prompts_of(built: LLMEngine, count: int) -> list[list[int]]:
    ids = built.tokenizer.encode(TEXT * 20)
    return [ids[start : start + 100] for start in range(count)]


def test_lengths_are_what_the_prefill_keeps(built: LLMEngine, tmp_path: Path):
    prompts = prompts_of(built, 3)
    lengths = measure_lengths(built.runner, prompts, tmp_path / "log", progress=False)
    expected = [np.asarray(built.runner.prefill(prompt).head_lengths) for prompt in prompts]
    np.testing.assert_array_equal(lengths, expected)
    assert abs(lengths.mean() - 24) < 1


def test_an_interrupted_measurement_goes_on(
    built: LLMEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    prompts, log = prompts_of(built, 3), tmp_path / "log"
    whole = measure_lengths(built.runner, prompts, log, progress=False)
    lines = log.read_text().splitlines()
    log.write_text("\n".join(lines[:2]) + "\n" + lines[2][:10])  # cut in the third
    prefill, measured = built.runner.prefill, []

    def counted(prompt: list[int]):
        measured.append(prompt)
        return prefill(prompt)

    monkeypatch.setattr(built.runner, "prefill", counted)
    again = measure_lengths(built.runner, prompts, log, progress=False)
    np.testing.assert_array_equal(again, whole)
    assert measured == [prompts[2]]


def test_a_profile_holds_means_and_what_other_prompts_got(built: LLMEngine, tmp_path: Path):
    prompts = prompts_of(built, 6)
    lengths = measure_lengths(built.runner, prompts, tmp_path / "log", progress=False)
    profile = make_profile(built.runner, "tiny", prompts, lengths, devices=2)
    np.testing.assert_allclose(profile.array, lengths.mean(0))
    assert profile.prompt_tokens == 100
    held_out = dict(profile.held_out)
    assert held_out["fair_copying on 2"] > held_out["static on 2"]
    assert Profile.from_json(profile.to_json()) == profile


def test_prompts_are_pieces_of_a_text(built: LLMEngine, tmp_path: Path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT * 10)
    ids = built.tokenizer.encode(TEXT * 10)
    prompts = read_prompts(file, built.tokenizer, 50)
    assert prompts == [ids[at : at + 50] for at in range(0, len(ids) - 49, 50)]
    with pytest.raises(ValueError, match="at least 9000 tokens"):
        read_prompts(file, built.tokenizer, 9000)


def test_prompts_are_lines_of_json(built: LLMEngine, tmp_path: Path):
    file = tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": "the well"}]
    lines = [{"prompt": "and then"}, {"messages": messages}]
    file.write_text("\n\n".join(map(json.dumps, lines)))
    tokenizer = built.tokenizer
    expected = [
        tokenizer.encode("and then"),
        tokenizer.encode(tokenizer.apply_chat_template(messages)),
    ]
    assert read_prompts(file, tokenizer, 50) == expected


@pytest.mark.parametrize("line", ["{", "[]", '{"text": "no prompt"}', '{"prompt": 3}'])
def test_a_bad_line_is_named(built: LLMEngine, tmp_path: Path, line: str):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "good"}\n' + line)
    with pytest.raises(ValueError, match="line 2 of"):
        read_prompts(file, built.tokenizer, 50)
