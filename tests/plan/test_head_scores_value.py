"""Head scores as a value and as a file."""

import json

import pytest

from fairkv_jax.plan import HeadScores, shipped_head_scores

GOOD = {"version": 1, "model": "m", "method": "gates", "scores": [[0.5, 1.0], [0.0, 0.25]]}


def test_json_gives_the_scores_back():
    scores = HeadScores("m", "attention", ((0.1, 0.2, -3.0),), sinks=4, recent=9, source="texts")
    assert HeadScores.from_json(scores.to_json()) == scores
    assert HeadScores.from_json(json.dumps(GOOD)).array.tolist() == GOOD["scores"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": [[1.0, float("nan")], [1.0, 1.0]]}, "layer 0, head 1 must be a finite number"),
        ({"scores": [[1.0, 1.0], ["x", 1.0]]}, "layer 1, head 0 must be a finite number, got 'x'"),
        ({"scores": [[1.0], [1.0, 2.0]]}, "same number of heads"),
        ({"scores": []}, "must be a table"),
        ({"scores": 3}, "must be a table"),
        ({"version": 2}, "version 2 cannot be read, only version 1"),
        ({"sinks": -1}, "sinks of head scores must be an integer >= 0, got -1"),
        ({"recent": 1.5}, "recent of head scores must be an integer >= 0, got 1.5"),
        ({"model": 7}, "model of head scores must be a string, got 7"),
    ],
)
def test_a_wrong_field_is_named(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        HeadScores.from_json(json.dumps(GOOD | change))


@pytest.mark.parametrize("text", ["", "[]", "{}", "nothing"])
def test_other_texts_are_refused_with_the_format(text: str):
    with pytest.raises(ValueError, match="must be a JSON object with version, model, method"):
        HeadScores.from_json(text)


def test_scores_of_another_model_are_refused():
    scores = HeadScores.from_json(json.dumps(GOOD))
    scores.check_model(2, 2)
    with pytest.raises(ValueError, match="scores of m are for 2 layers x 2 KV heads, but x has 30"):
        scores.check_model(30, 3, "x")


def test_models_without_shipped_scores():
    assert shipped_head_scores("unknown") is None
