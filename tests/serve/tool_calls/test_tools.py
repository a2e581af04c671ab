"""The schemas that force calls: what they describe can be said, and nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest

from fairkv_jax.checkpoint import open_checkpoint
from fairkv_jax.engine.structured_output import GrammarCompiler
from fairkv_jax.sampling_params import StructuredOutputsParams
from fairkv_jax.serve.protocol import ChatBody

GO = {
    "$defs": {"Place": {"enum": ["Rome", "Paris"]}},
    "properties": {"at": {"$ref": "#/$defs/Place"}},
    "required": ["at"],
}
GROW = {"properties": {"under": {"$ref": "#"}}}
TOOLS = [
    {"type": "function", "function": {"name": "go", "parameters": GO}},
    {"type": "function", "function": {"name": "grow", "parameters": GROW}},
    {"type": "function", "function": {"name": "stay"}},
]


@pytest.fixture(scope="module")
def compiler(checkpoint: Path) -> GrammarCompiler:
    opened = open_checkpoint(checkpoint)
    return GrammarCompiler(opened.tokenizer(), opened.config.vocab_size)


def constraint(**fields: Any) -> StructuredOutputsParams:
    body = {"messages": [{"role": "user", "content": "x"}], "tools": TOOLS, **fields}
    params = ChatBody.model_validate(body).sampling_params().structured_outputs
    assert params is not None
    return params


def is_allowed(compiler: GrammarCompiler, params: StructuredOutputsParams, text: str) -> bool:
    """Whether every token of a text may come next, and the end after them."""
    matcher = compiler.matcher(params)
    for token_id in [*compiler._tokenizer.encode(text), 2]:
        words = matcher.bitmask()
        if not words[token_id // 32] >> (token_id % 32) & 1:
            return False
        matcher.accept(token_id)
    return True


def call(name: str, **parameters: Any) -> dict[str, Any]:
    return {"name": name, "parameters": parameters}


@pytest.mark.parametrize(
    ("calls", "allowed"),
    [
        ([call("go", at="Rome")], True),
        ([call("go", at="Oslo")], False),
        ([call("go")], False),
        ([call("grow", under={"under": {}})], True),
        ([call("grow", at="Rome")], False),
        ([call("stay")], True),
        ([call("stay", at="Rome")], False),
        ([call("stay"), call("go", at="Paris")], True),
        ([call("run")], False),
        ([], False),
        (call("stay"), False),
    ],
)
def test_required_calls(compiler: GrammarCompiler, calls: Any, allowed: bool):
    params = constraint(tool_choice="required")
    assert is_allowed(compiler, params, json.dumps(calls)) == allowed
    if isinstance(calls, list) and len(calls) == 2:
        one = constraint(tool_choice="required", parallel_tool_calls=False)
        assert not is_allowed(compiler, one, json.dumps(calls))


def test_named_calls(compiler: GrammarCompiler):
    def named(name: str) -> StructuredOutputsParams:
        return constraint(tool_choice={"type": "function", "function": {"name": name}})

    assert is_allowed(compiler, named("go"), '{"at": "Rome"}')
    assert not is_allowed(compiler, named("go"), '{"at": "Oslo"}')
    assert is_allowed(compiler, named("grow"), '{"under": {}}')
    assert is_allowed(compiler, named("stay"), "{}")


@pytest.mark.parametrize("choice", ["required", {"function": {"name": "go"}}])
@pytest.mark.parametrize("strict", [None, True, False])
def test_a_function_that_is_not_strict_may_get_other_members(
    compiler: GrammarCompiler, choice: Any, strict: bool | None
):
    tool = {"function": {"name": "go", "parameters": GO, "strict": strict}}
    params = constraint(tools=[tool], tool_choice=choice)
    for arguments, allowed in (
        ({"at": "Rome"}, True),
        ({"at": "Rome", "x": 1}, strict is False),
        ({"at": "Oslo"}, False),
    ):
        said = [call("go", **arguments)] if choice == "required" else arguments
        assert is_allowed(compiler, params, json.dumps(said)) == allowed


def test_parts_of_one_object_do_not_exclude_each_other(compiler: GrammarCompiler):
    number = {"type": "integer"}
    base = {"type": "object", "properties": {"a": number}, "required": ["a"]}
    more = {"properties": {"b": {"properties": {"c": number}}}, "required": ["b"]}
    parameters = {"$defs": {"Base": base}, "allOf": [{"$ref": "#/$defs/Base"}, more]}
    tool = {"function": {"name": "go", "parameters": parameters}}
    params = constraint(tools=[tool], tool_choice={"function": {"name": "go"}})
    assert is_allowed(compiler, params, '{"a": 1, "b": {"c": 2}}')
    assert is_allowed(compiler, params, '{"a": 1, "b": {}, "d": 3}')
    assert not is_allowed(compiler, params, '{"a": 1, "b": {"d": 3}}')
    assert not is_allowed(compiler, params, '{"a": 1}')


def test_choices_that_force_nothing():
    body = {"messages": [{"role": "user", "content": "x"}], "tools": TOOLS}
    for choice in (None, "auto", "none"):
        chat = ChatBody.model_validate({**body, "tool_choice": choice})
        assert chat.sampling_params().structured_outputs is None
        assert chat.finds_calls == (choice != "none")
