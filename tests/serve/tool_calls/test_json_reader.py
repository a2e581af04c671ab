"""The incremental reader takes what Python's takes, but for NaN and Infinity."""

import json
import random

import pytest

from fairkv_jax.serve.tool_calls.events import Malformed
from fairkv_jax.serve.tool_calls.json_reader import read_value


def read(text: str) -> tuple[str, str] | None:
    """What the reader passes on, and what follows the value; None if it is malformed."""
    out: list[str] = []
    reader = read_value(text[:1], out.append)
    rest = iter([*text[1:], ""])
    try:
        next(reader)
        while True:
            reader.send(next(rest))
    except StopIteration as end:
        return "".join(out), end.value + "".join(rest)
    except Malformed:
        return None


@pytest.mark.parametrize(
    "text",
    [
        '{"a": [1, {"b": "\\\\u00e9\\n"}], "c": -0.5e+10}',
        '[ [ ] , { } , "" , [ 1 , 2 ] ]',
        "true",
        "12",
        '"x"',
        "[" * 3000 + "]" * 3000,
    ],
)
def test_values_are_passed_on_unchanged(text: str):
    assert read(text) == (text, "")
    assert read(f"{text} x") == (text, " x")


@pytest.mark.parametrize(
    "text",
    [
        *("01", "1.", ".5", "1e", "-", "+1", "nul", "NaN", "'a'", '"\\x"', '"\\u12g4"', '"\t"'),
        *("{,}", "[1,]", "[,1]", '{"a"}', '{"a":}', '{"a":1,}', "{1:2}", "[1}", "[1 2]", "[", '"'),
        *("{", ""),
    ],
)
def test_what_is_not_json_is_malformed(text: str):
    assert read(text) is None


def test_random_texts_are_judged_as_python_judges_them():
    random_ = random.Random(0)
    pieces = ['"a"', "1", "-2.5", "true", "null", "{", "}", "[", "]", ",", ":", " ", '"\\n"', "e1"]
    valid = 0
    for _ in range(20_000):
        text = "".join(random_.choices(pieces, k=random_.randrange(1, 9))).strip()
        try:
            json.loads(text)
            expected = (text, "")
        except ValueError:
            expected = None
        found = read(text) if text else None
        if found is not None and found[1]:
            found = None  # a value is followed by something else
        assert found == expected, text
        valid += expected is not None
    assert valid > 500
