"""The synthetic tasks: what is asked for stands in the document, where it is said to stand."""

import re
from pathlib import Path

import numpy as np
import pytest

from fairkv_jax.evaluate.documents import Question
from fairkv_jax.evaluate.haystack import Haystack, read_haystack
from fairkv_jax.evaluate.sample import TaskOptions
from fairkv_jax.evaluate.tasks import TASKS, make_document

HAYSTACK = Haystack(
    "made up", tuple(f"Sentence {n} says that {n * n} is its square." for n in range(60))
)
OPTIONS = TaskOptions(HAYSTACK)
LENGTH = 700


def count_words(text: str) -> int:
    """A tokenizer of words and marks."""
    return len(re.findall(r"\w+|[^\w\s]", text))


@pytest.mark.parametrize("name", TASKS)
def test_prompts_fill_the_length_and_seeds_reproduce(name: str):
    document = make_document(name, OPTIONS, 3, LENGTH, count_words)
    prompt = document.text + document.questions[0].text
    assert 0.93 * LENGTH < count_words(prompt) <= LENGTH
    assert make_document(name, OPTIONS, 3, LENGTH, count_words) == document
    others = [
        make_document(name, OPTIONS, 4, LENGTH, count_words),
        make_document(name, TaskOptions(HAYSTACK, seed=1), 3, LENGTH, count_words),
    ]
    assert document not in others


@pytest.mark.parametrize("name", TASKS)
def test_every_answer_stands_in_the_document(name: str):
    for sample in range(8):
        document = make_document(name, OPTIONS, sample, LENGTH, count_words)
        for question in document.questions:
            assert question.score(document.text) == 1
            assert question.score("") == 0
            assert question.score(question.text) < 1, "the question gives the answer away"


@pytest.mark.parametrize("name", ["niah_single", "niah_multikey"])
def test_a_needle_stands_at_its_recorded_depth(name: str):
    depths = []
    for sample in range(20):
        document = make_document(name, OPTIONS, sample, LENGTH, count_words)
        (question,) = document.questions
        (number,), asked = question.answers, question.text.rsplit("for ", 1)[1].split(" ")[0]
        needle = f"The secret number for {asked} is {number}."
        assert document.text.count(needle) == 1
        end = len(document.text) - len(needle)
        assert question.depth == pytest.approx(document.text.index(needle) / end)
        depths.append(question.depth)
    gaps = np.diff(np.sort([0.0, *depths, 1.0]))
    assert gaps.max() < 0.12, "20 depths are spread evenly"


def test_multikey_has_distractors_of_the_same_form():
    options = TaskOptions(HAYSTACK, questions_per_document=3)
    document = make_document("niah_multikey", options, 0, LENGTH, count_words)
    needles = re.findall(r"The secret number for (\w+) is (\d{3})\.", document.text)
    assert len(dict(needles)) == len({number for _, number in needles}) == 4
    assert len(document.questions) == 3
    for question in document.questions:
        name = question.text.rsplit("for ", 1)[1].split(" ")[0]
        assert question.answers == (dict(needles)[name],)


@pytest.mark.parametrize(("hops", "asked"), [(1, 1), (4, 2), (6, 3)])
def test_a_chain_of_variables_is_right_by_a_walk(hops: int, asked: int):
    """Executes the assignments in the order of the text, as if it were a program."""
    options = TaskOptions(HAYSTACK, hops=hops, questions_per_document=asked)
    document = make_document("variable_tracking", options, 2, LENGTH, count_words)
    values: dict[str, str] = {}
    for name, variable, number in re.findall(
        r"VAR (\w{3}) = (?:VAR (\w{3})|(\d{5}))\.", document.text
    ):
        values[name] = values[variable] if variable else number
    assert len(document.questions) == asked
    for question in document.questions:
        (number,) = set(re.findall(r"\d{5}", question.text))
        assert {n for n, value in values.items() if value == number} == set(question.answers)
        assert len(question.answers) == hops + 1
    assert len(set(values.values())) == max(2, asked)


def test_the_most_frequent_words_are_asked_for():
    document = make_document("frequent_words", OPTIONS, 0, LENGTH, count_words)
    words = document.text.split("\n", 1)[1].split(" ")
    names, counts = np.unique(words, return_counts=True)
    order = names[np.argsort(-counts)].tolist()
    assert order[0] == "..."
    assert order[1:4] == list(document.questions[0].answers)
    common = make_document("common_words", OPTIONS, 0, LENGTH, count_words)
    names, counts = np.unique(re.findall(r"\d+\. (\w+)", common.text), return_counts=True)
    often = names[counts == counts.max()].tolist()
    assert sorted(often) == sorted(common.questions[0].answers)
    assert counts.max() == 10 * np.sort(counts)[-11]


def test_scores():
    every = Question("", ("123", "Alpha"))
    assert [every.score(text) for text in ("", "a 123 b", "ALPHA", "alpha 123")] == [0, 0.5, 0.5, 1]
    some = Question("", ("one", "two"), needs_all=False)
    assert [some.score(text) for text in ("three", "Two.", "one two")] == [0, 1, 1]


def test_haystacks(tmp_path: Path):
    assert len(read_haystack("python").sentences) > 300
    assert len(set(read_haystack("noise").take(10, np.random.default_rng(0)))) <= 4
    path = tmp_path / "text.txt"
    path.write_text("One  sentence.\nAnother\none! A third")
    own = read_haystack(str(path))
    assert own.sentences == ("One sentence.", "Another one!", "A third")
    assert own.fingerprint != read_haystack("noise").fingerprint
    path.write_text(" ")
    with pytest.raises(ValueError, match="contains no text"):
        read_haystack(str(path))
    with pytest.raises(ValueError, match="cannot read --haystack"):
        read_haystack(str(tmp_path / "missing"))


def test_a_length_that_no_prompt_fits():
    with pytest.raises(ValueError, match="a length of 20 tokens is too short"):
        make_document("niah_multikey", OPTIONS, 0, 20, count_words)
