"""What grammars allow: whatever is drawn matches, and what matches can be drawn."""

import gc
import json
import re
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from fairkv_jax.checkpoint import open_checkpoint
from fairkv_jax.checkpoint.fetch import DEMO_MODEL
from fairkv_jax.config import GrammarLimits
from fairkv_jax.engine.structured_output import GrammarCompiler, GrammarMatcher
from fairkv_jax.sampling_params import StructuredOutputsParams
from fairkv_jax.tokenizer import Tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}


def is_person(text: str) -> bool:
    person = json.loads(text)
    return (
        {"name", "age"} <= set(person) <= {"name", "age", "tags"}
        and len(person["name"]) <= 8
        and type(person["age"]) is int
        and 0 <= person["age"] <= 120
        and set(person.get("tags", ())) <= {"a", "b"}
    )


CASES: dict[str, tuple[StructuredOutputsParams, Callable[[str], object], str]] = {
    "json": (StructuredOutputsParams(json=SCHEMA), is_person, '{"name":"Ann","age":7,"tags":[]}'),
    "regex": (
        StructuredOutputsParams(regex=r"[a-f0-9]{2}(-[a-f0-9]{2}){1,5}"),
        re.compile(r"[a-f0-9]{2}(-[a-f0-9]{2}){1,5}").fullmatch,
        "0a-ff-99",
    ),
    "choice": (
        StructuredOutputsParams(choice=["yes", 'no "no"', "yes and no"]),
        lambda text: text in ("yes", 'no "no"', "yes and no"),
        "yes and no",
    ),
    "lark": (
        StructuredOutputsParams(grammar='start: "(" start ")" | /[0-9]{1,3}/'),
        re.compile(r"(\(*)[0-9]{1,3}(\)*)").fullmatch,
        "((42))",
    ),
    "gbnf": (
        StructuredOutputsParams(grammar='root ::= "<" [a-c] [a-c]? ">"'),
        re.compile(r"<[abc]{1,2}>").fullmatch,
        "<ab>",
    ),
}


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    return open_checkpoint(tiny_checkpoint).tokenizer()


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, 384, GrammarLimits(timeout_s=60.0))  # also on a busy machine


def allowed(matcher: GrammarMatcher) -> list[int]:
    bits = np.unpackbits(matcher.bitmask().view(np.uint8), bitorder="little")
    return np.flatnonzero(bits).tolist()


@pytest.mark.parametrize("name", CASES)
def test_whatever_is_drawn_matches(grammars: GrammarCompiler, tokenizer: Tokenizer, name: str):
    params, matches, _ = CASES[name]
    rng = np.random.default_rng(4)
    finished = set()
    for _ in range(40):
        matcher, drawn = grammars.matcher(params), []
        while not matcher.is_over and len(drawn) < 300:
            choices = allowed(matcher)
            ends = [token for token in choices if token in tokenizer.eos_token_ids]
            drawn.append(ends[0] if ends and rng.random() < 0.5 else int(rng.choice(choices)))
            matcher.accept(drawn[-1])
            assert not matcher.has_failed
        if matcher.is_over:
            text = tokenizer.decode(drawn, skip_special_tokens=True)
            assert matches(text), text
            finished.add(text)
    assert len(finished) > 2 or name == "choice"


@pytest.mark.parametrize("name", CASES)
def test_what_matches_can_be_drawn_and_ended_by_any_end(
    grammars: GrammarCompiler, tokenizer: Tokenizer, name: str
):
    params, _, example = CASES[name]
    matcher = grammars.matcher(params)
    for token in tokenizer.encode(example):
        assert token in allowed(matcher)
        assert not matcher.is_over
        matcher.accept(token)
    assert set(tokenizer.eos_token_ids) <= set(allowed(matcher))


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_reasoning_comes_before_what_is_constrained(tokenizer: Tokenizer, name: str, added: bool):
    """Its marks may be tokens of their own, as they are in the vocabularies of such models."""
    backend = Backend.from_str(tokenizer.to_json())
    if added:
        backend.add_tokens(["<think>", "</think>"])
    with_marks = Tokenizer(backend, eos_token_ids=tokenizer.eos_token_ids)
    grammars = GrammarCompiler(with_marks, with_marks.vocab_size)
    params, _, answer = CASES[name]

    def is_answer(reasoning: str | None, text: str) -> bool:
        matcher = grammars.matcher(replace(params, reasoning=reasoning))
        for token in with_marks.encode(text):
            if token not in allowed(matcher):
                return False
            matcher.accept(token)
        return tokenizer.eos_token_ids <= set(allowed(matcher))

    marked, open_, wrong = f"<think>\nAh {{.</think>\n{answer}", f"Ah.</think>{answer}", "</think>?"
    assert [is_answer("required", each) for each in (marked, open_, answer)] == [True, True, False]
    assert [is_answer("optional", each) for each in (marked, open_, answer)] == [True, False, True]
    assert [is_answer(None, each) for each in (marked, answer)] == [False, True]
    assert not is_answer("required", wrong)
    assert not is_answer("required", "<think> on and on")


def test_any_object(grammars: GrammarCompiler, tokenizer: Tokenizer):
    matcher = grammars.matcher(StructuredOutputsParams(json_object=True))
    for token in tokenizer.encode('{"a": [1, {"b": null}], "c": "d"}'):
        assert token in allowed(matcher)
        matcher.accept(token)
    assert matcher.is_over
    first = grammars.matcher(StructuredOutputsParams(json_object=True))
    assert not set(allowed(first)) & set(tokenizer.encode("[1"))


def test_a_forbidden_token_is_a_failure_and_stays_one(
    grammars: GrammarCompiler, tokenizer: Tokenizer
):
    params = StructuredOutputsParams(regex="[0-9]+")
    matcher, other = grammars.matcher(params), grammars.matcher(params)
    for text in ("x", "1"):
        matcher.accept(tokenizer.encode(text)[0])
        assert matcher.has_failed
    assert not other.has_failed


@pytest.mark.parametrize(
    ("params", "fault"),
    [
        ({"json": "{"}, "Expecting property name"),
        ({"json": "[" * 100_000}, "nested too deeply"),
        ({"json": "5"}, "schema must be an object or boolean"),
        ({"json": {"type": "objekt"}}, "Invalid type: objekt"),
        ({"json": {"$ref": "#/$defs/a"}}, "'/\\$defs/a' does not exist"),
        ({"json": {"$ref": "http://127.0.0.1/a.json"}}, "does not fetch"),
        ({"json": {"$ref": "#"}}, "no output matches it"),
        ({"json": {"type": "string", "minLength": 2, "maxLength": 1}}, "minLength"),
        ({"json": {"type": "string", "pattern": "(?=a)"}}, "look-around"),
        ({"regex": "[a-"}, "unclosed character class"),
        ({"regex": "(" * 10_000}, "unclosed group"),
        ({"regex": "\ud800"}, "surrogates"),
        ({"grammar": "start: nothing"}, 'unknown name: "nothing"'),
        ({"grammar": "root ::= nothing"}, "'nothing' not found"),
        ({"grammar": 'start: ' + '(' * 100_000}, "too deeply nested"),
        ({"grammar": ""}, "root"),
        ({"regex": "((((a{100}){100}){100}){100}){100}"}, "too many expressions"),
    ],
)  # fmt: skip
def test_faults_are_named_in_a_line(grammars: GrammarCompiler, params: dict, fault: str):
    with pytest.raises(ValueError, match=fault) as error:
        grammars.matcher(StructuredOutputsParams(**params))
    assert len(str(error.value)) <= 200
    assert "\n" not in str(error.value)


def test_a_tokenizer_that_no_grammar_can_be_laid_over_is_named():
    """Without bytes behind its tokens, and without a token that ends."""
    for model, decoder, ends in (
        (models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"), None, [1]),
        (models.BPE({"a": 0, "b": 1}, []), decoders.ByteLevel(), []),
    ):
        backend = Backend(model)
        if decoder is not None:
            backend.decoder = decoder  # type: ignore[assignment]  # its stubs know the getter only
        grammars = GrammarCompiler(Tokenizer(backend, eos_token_ids=ends), 2)
        with pytest.raises(ValueError, match="outputs of this model cannot be constrained"):
            grammars.matcher(StructuredOutputsParams(regex="a"))


def test_threads_compile_and_match_side_by_side(grammars: GrammarCompiler, tokenizer: Tokenizer):
    def walk(number: int) -> bool:
        matcher = grammars.matcher(StructuredOutputsParams(regex=f"{number % 3}[ab]{{200}}"))
        for token in tokenizer.encode(f"{number % 3}" + "ab" * 100):
            assert token in allowed(matcher)
            matcher.accept(token)
        return matcher.is_over

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(walk, range(12)))


def test_the_workers_end_with_the_compiler(tokenizer: Tokenizer):
    """Not only with the process, although its grammars are counted."""
    grammars = GrammarCompiler(tokenizer, 384)
    matcher = grammars.matcher(StructuredOutputsParams(regex="[0-9]+"))
    compiler, pool = weakref.ref(grammars), weakref.ref(grammars._pool)
    del grammars, matcher
    gc.collect()
    assert compiler() is None
    assert pool() is None


def test_a_real_vocabulary_allows_long_tokens():
    """One token of the demo model's stands for several characters of the object."""
    checkpoint = open_checkpoint(DEMO_MODEL)
    tokenizer = checkpoint.tokenizer()
    matcher = GrammarCompiler(tokenizer, checkpoint.config.vocab_size).matcher(
        StructuredOutputsParams(json_object=True)
    )
    for token in tokenizer.encode('{"name": "SmolLM", "sizes": [135, 360, 1700]}'):
        assert token in allowed(matcher)
        matcher.accept(token)
    assert matcher.is_over
