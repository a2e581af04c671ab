"""Published head scores become profiles; real tables are tried where a variable names them."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from fairkv_jax.plan import make_plan
from fairkv_jax.profile import from_duo_attention, from_headkv, read_headkv_json, read_table


def test_duo_attention_keeps_everything_in_retrieval_heads():
    scores = np.array([[0.9, 0.1], [-0.01, 0.8]])
    profile = from_duo_attention(scores, prompt_tokens=1000, sinks=16, recent=64)
    assert profile.array.tolist() == [[1000, 80], [80, 1000]]
    short = from_duo_attention(scores, prompt_tokens=50)
    assert short.array.tolist() == [[50, 50], [50, 50]]


@pytest.mark.parametrize(("quantile", "retrieval"), [(0.0, 4), (0.25, 3), (0.75, 1), (1.0, 0)])
def test_duo_attention_streams_the_quantile(quantile, retrieval):
    scores = np.array([[0.1, 0.2], [0.3, 0.4]])
    profile = from_duo_attention(scores, prompt_tokens=1000, quantile=quantile)
    assert (profile.array == 1000).sum() == retrieval


def test_headkv_deals_the_pool_by_score():
    scores = np.array([[1.0, 3.0, 0.0, 0.0], [2.0, 0.0, 1.0, 1.0]])
    profile = from_headkv(
        scores, num_kv_heads=2, budget=108, prompt_tokens=10_000, window=8, beta=2.0
    )
    # Half of 100 tokens a head are dealt; grouped scores are 2, 0, 1, 1 of 4; 58 are kept anyway.
    assert profile.array == pytest.approx(np.array([[158.0, 58.0], [108.0, 108.0]]))


def test_headkv_deals_again_what_a_prompt_is_too_short_for():
    scores = np.array([[8.0, 1.0, 1.0]])
    profile = from_headkv(scores, num_kv_heads=3, budget=108, prompt_tokens=150, window=8, beta=2.0)
    assert profile.array == pytest.approx(np.array([[150.0, 87.0, 87.0]]))


def test_tables_and_json_are_read(tmp_path):
    table = tmp_path / "scores.tsv"
    table.write_text("0.5\t-1e-3\n1\t2\n")
    assert read_table(table).tolist() == [[0.5, -0.001], [1, 2]]
    scores = tmp_path / "scores.json"
    scores.write_text(json.dumps({"0-0": [1, 3], "0-1": [0], "1-0": 5, "1-1": [1]}))
    assert read_headkv_json(scores).tolist() == [[2, 0], [5, 1]]


@pytest.mark.parametrize(
    ("reader", "text", "message"),
    [
        (read_table, "", "same number of heads"),
        (read_table, "1\t2\n3\n", "same number of heads"),
        (read_table, "1\tx\n", "could not convert"),
        (read_table, "1\tnan\n", "layer 0, head 1 is not finite"),
        (read_headkv_json, "[1]", "is not an object"),
        (read_headkv_json, "{}", "is not an object"),
        (read_headkv_json, '{"a-b": 1}', "is not an object"),
        (read_headkv_json, '{"0-0": 1, "1-1": 1}', r"head \(0, 1\) has no score"),
    ],
)
def test_bad_files_are_named(tmp_path, reader, text, message):
    path = tmp_path / "scores"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        reader(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 8}, "must be larger than the window 8"),
        ({"beta": 0.5}, "beta must be at least 1"),
        ({"num_kv_heads": 3}, "do not divide"),
        ({"prompt_tokens": 0}, "prompt_tokens must be at least 1"),
        ({"scores": np.zeros((2, 4))}, "at least one must be positive"),
    ],
)
def test_bad_headkv_options_are_named(change, message):
    options = {"scores": np.ones((2, 4)), "num_kv_heads": 2, "budget": 64, "prompt_tokens": 512}
    with pytest.raises(ValueError, match=message):
        from_headkv(**(options | change))


def test_bad_duo_attention_options_are_named():
    with pytest.raises(ValueError, match="quantile must be in"):
        from_duo_attention(np.ones((1, 1)), prompt_tokens=8, quantile=2.0)
    with pytest.raises(ValueError, match="sinks must be at least 0"):
        from_duo_attention(np.ones((1, 1)), prompt_tokens=8, sinks=-1)


@pytest.mark.skipif(
    "FAIRKV_HEAD_SCORES" not in os.environ, reason="FAIRKV_HEAD_SCORES names no folder"
)
def test_published_tables_give_plans():
    tables = sorted(Path(os.environ["FAIRKV_HEAD_SCORES"]).glob("*.tsv"))
    assert tables
    for path in tables:
        scores = read_table(path)
        if path.name.startswith("duo"):
            profile = from_duo_attention(scores, prompt_tokens=8192)
        else:
            profile = from_headkv(scores, num_kv_heads=8, budget=512, prompt_tokens=8192)
            assert profile.array.mean() == pytest.approx(512)
        static, best = (make_plan(profile, 4, name) for name in ("static", "best_effort"))
        assert best.step_seconds <= static.step_seconds
