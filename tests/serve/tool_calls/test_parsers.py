"""Outputs as the models' documentation writes them, whole and divided at every character."""

import json
import random

import pytest

from fairkv_jax.serve.message import MessageBuilder
from fairkv_jax.serve.tool_calls import TOOL_PARSERS
from tests.serve.tool_calls.reading import Build, divisions, said, streamed, whole

PARIS = '{"city": "Paris"}'
HARD = (
    r'{"text": "a \"}</tool_call>{[TOOL_CALLS] \u00e9 \\", "n": [1, -2.5e3, true, null], "o": {}}'
)
CODE = '{"code": "if a < b:\\n    print(\'<tool_call>\')"}'


def builder(name: str, **options: bool) -> Build:
    parser = TOOL_PARSERS[name]
    return lambda: MessageBuilder(parser(), None, parser.new_call_id, **options)


CALLS = [
    # https://github.com/NousResearch/Hermes-Function-Calling, and Qwen's documentation
    (
        "hermes",
        f'<tool_call>\n{{"arguments": {PARIS}, "name": "get_weather"}}\n</tool_call>',
        said(None, ("get_weather", PARIS)),
    ),
    (
        "hermes",
        f'I shall look it up.\n<tool_call>\n{{"name": "a", "arguments": {PARIS}}}\n</tool_call>\n'
        '<tool_call>\n{"name": "b", "arguments": {}}\n</tool_call>',
        said("I shall look it up.", ("a", PARIS), ("b", "{}")),
    ),
    (
        "hermes",
        f'<tool_call>{{"name":"a","arguments":{HARD}}}</tool_call>',
        said(None, ("a", HARD)),
    ),
    (
        "hermes",
        f'a <tool b\n\n<tool_call>\n{{"name": "run", "arguments": {CODE}}}\n',
        said("a <tool b", ("run", CODE)),
    ),
    (
        "hermes",
        '<tool_call>{"name": "a", "arguments": {"n": 1}}</tool_call> done </tool_call>',
        said(" done </tool_call>", ("a", '{"n": 1}')),
    ),
    (
        "hermes",
        '<tool_call>{"name": "a", "arguments": "{\\"n\\": 1}"}</tool_call>',
        said(None, ("a", '{"n": 1}')),
    ),
    # https://www.llama.com/docs/model-cards-and-prompt-formats/llama3_1/
    (
        "llama3_json",
        f'{{"name": "get_weather", "parameters": {PARIS}}}',
        said(None, ("get_weather", PARIS)),
    ),
    (
        "llama3_json",
        f'<|python_tag|>{{"type": "function", "name": "a", "parameters": {HARD}}}',
        said(None, ("a", HARD)),
    ),
    (
        "llama3_json",
        f'Use {{x}}: {{"name": "a", "parameters": {PARIS}}}; {{"name": "b", "parameters": {{}}}}',
        said("Use {x}:", ("a", PARIS), ("b", "{}")),
    ),
    (
        "llama3_json",
        f'{{\n  "name": "a",\n  "arguments": {PARIS}\n}};',
        said(None, ("a", PARIS)),
    ),
    # https://docs.mistral.ai, of tokenizers before and from version 11
    (
        "mistral",
        f'[TOOL_CALLS] [{{"name": "a", "arguments": {PARIS}}},\n'
        f'{{"name": "b", "arguments": {HARD}}}]',
        said(None, ("a", PARIS), ("b", HARD)),
    ),
    (
        "mistral",
        f'Wait. [TOOL_CALLS][{{"arguments": {PARIS}, "name": "a", "id": "VvvODy9mT"}}]',
        said("Wait.", ("a", PARIS)),
    ),
    (
        "mistral",
        f"[TOOL_CALLS]a[ARGS]{PARIS}[TOOL_CALLS]b{HARD}",
        said(None, ("a", PARIS), ("b", HARD)),
    ),
    (
        "mistral",
        f"Well [TOOLS] [TOOL_CALLS]a[CALL_ID]bbc5b7ede[ARGS]{PARIS}",
        said("Well [TOOLS]", ("a", PARIS)),
    ),
    # https://github.com/meta-llama/llama-models, models/llama3_2/text_prompt_format.md
    (
        "pythonic",
        "[get_weather(city='Paris', metric=\"celsius\"), get_weather(city='Rome')]",
        said(
            None,
            ("get_weather", '{"city": "Paris", "metric": "celsius"}'),
            ("get_weather", '{"city": "Rome"}'),
        ),
    ),
    (
        "pythonic",
        "Let me see [1].\n[ now( ) , math.add(a=-1.5, b=[1, (2, 'x)'), {'k': None}], c=true,)]",
        said(
            "Let me see [1].",
            ("now", "{}"),
            ("math.add", '{"a": -1.5, "b": [1, [2, "x)"], {"k": null}], "c": true}'),
        ),
    ),
    (
        "pythonic",
        r"""[run(code='a = "x"\nb = \'y\' \d')]""",
        said(None, ("run", json.dumps({"code": "a = \"x\"\nb = 'y' \\d"}))),
    ),
]


@pytest.mark.parametrize(("name", "output", "expected"), CALLS)
def test_calls(name: str, output: str, expected: dict):
    build = builder(name)
    assert whole(build, output) == expected
    for pieces in divisions(output):
        assert streamed(build, pieces) == expected, pieces
    for call in expected["tool_calls"]:
        json.loads(call["function"]["arguments"])
    done = build()
    done.message(output)
    assert [done.finish_reason(each) for each in ("stop", "length")] == ["tool_calls", "length"]


TEXTS = [
    ("hermes", ""),
    ("hermes", " \n"),
    ("hermes", "no calls <tool_cal\n\n"),
    ("hermes", "<tool_call>"),
    ("hermes", "</tool_call> <tool_call>\nget_weather('Paris')\n</tool_call>"),
    ("hermes", '<tool_call>{"name": "a", "argumen'),
    ("hermes", '<tool_call>{"name": "a"}</tool_call>'),
    ("hermes", '<tool_call>{"name": "a", "arguments": [1]}</tool_call>'),
    ("hermes", '<tool_call>{"name": "a", "arguments": "{"}</tool_call>'),
    ("hermes", r'<tool_call>{"name": "a", "arguments": "{\"\ud800\": 1}"}</tool_call>'),
    ("hermes", '<tool_call>{"name": "", "arguments": {}}</tool_call>'),
    ("hermes", r'<tool_call>{"name": "\ud800", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": 5, "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"arguments": {"a": nul}, "name": "a"}</tool_call>'),
    ("hermes", '<tool_call>{"arguments": ' + "[" * 5000),
    ("hermes", '<tool_call>{"arguments": ' + "[" * 5000 + "]" * 5000 + ', "name": "a"}'),
    ("llama3_json", '{"answer": {"name": "x", "parameters": {}}, "n": 1}'),
    ("llama3_json", "{} a } b { c"),
    ("llama3_json", '<|python_tag|>brave_search.call(query="x")'),
    ("mistral", "[TOOL_CALLS]"),
    ("mistral", "[TOOL_CALLS]I cannot do that {x}"),
    ("mistral", "[TOOL_CALLS]a[ARG]{}"),
    ("mistral", '[TOOL_CALLS][{"name": "a"}]'),
    ("pythonic", "[1, 2]"),
    ("pythonic", "[see](https://example.org/a(b=1))"),
    ("pythonic", "as in [f(a=1)]"),
    ("pythonic", "[f('Paris')]"),
    ("pythonic", "[f(a=g())]"),
    ("pythonic", "[f(a=1e999)]"),
    ("pythonic", "[f(a='\\ud800')]"),
    ("pythonic", "[f(a={1: 2})]"),
    ("pythonic", "[f(a=" + "(" * 500),
    ("pythonic", "[f(a=" + "-" * 3000 + "1)]"),
    ("pythonic", "[f(a=(1]) b)]"),
    ("pythonic", "[2f(a=1)]"),
]


@pytest.mark.parametrize(("name", "output"), TEXTS, ids=lambda value: value[:40])
def test_what_is_not_a_call_is_content(name: str, output: str):
    build = builder(name)
    assert whole(build, output) == said(output)
    for pieces in divisions(output) if len(output) < 200 else ([output], list(output)):
        assert streamed(build, pieces) == said(output), pieces


BROKEN = [
    ("hermes", "x\n", '<tool_call>{"name": "a", "arguments": {"b": 1-2}}</tool_call>', '{"b": 1-2'),
    ("hermes", "", '<tool_call>{"name": "a", "arguments": {"b": "c', '{"b": "c'),
    ("hermes", "", '<tool_call>{"name": "a", "arguments": {}</tool_call>', "{}"),
    ("hermes", "", '<tool_call>{"name": "a", "arguments": {"b": "\n"}}', '{"b": "'),
    ("llama3_json", "", '{"name": "a", "parameters": {"b" 1}}', '{"b" '),
    ("mistral", "", "[TOOL_CALLS]a[ARGS]{b: 1}", "{"),
    ("pythonic", "", "[f(a=1, 2)]", '{"a": 1'),
]


@pytest.mark.parametrize(("name", "before", "call", "arguments"), BROKEN)
def test_a_call_that_breaks_after_its_name(name: str, before: str, call: str, arguments: str):
    """It is content; a stream, which has sent its beginning, does not end with "tool_calls"."""
    build = builder(name)
    assert whole(build, before + call) == said(before + call)
    for pieces in divisions(before + call):
        message = streamed(build, pieces)
        (sent,) = message["tool_calls"]
        assert sent["function"]["arguments"] == arguments
        assert (message["content"] or "").startswith(before.strip())
    done = build()
    done.delta(before + call, is_last=True)
    assert done.finish_reason("stop") == "stop"


def test_a_broken_call_does_not_take_others_along():
    good = '<tool_call>{"name": "a", "arguments": {}}</tool_call>'
    bad = '<tool_call>{"name": "b", "arguments": {]}</tool_call>'
    assert whole(builder("hermes"), good + bad + good) == said(bad, ("a", "{}"), ("a", "{}"))


def test_only_the_first_call_where_calls_may_not_be_parallel():
    output = '<tool_call>{"name": "a", "arguments": {}}</tool_call>' * 3
    build = builder("hermes", is_parallel=False)
    for pieces in divisions(output):
        assert streamed(build, pieces) == whole(build, output) == said(None, ("a", "{}"))


FRAGMENTS = [
    *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "[CALL_ID]x"),
    *('"name"', '"arguments"', '"parameters"', '"f"', ": ", ", ", "{", "}", "[", "]", "f(", "a="),
    *(")", "'x'", "1", "-", "null", "\\", '"', "\n", " ", ";", "é", "f", '{"name": "f", '),
    *('"arguments": {', "{}}", "[f(a=1", "])", '{"name": "g", "parameters": {"a": [1]}}'),
]


@pytest.mark.parametrize("name", TOOL_PARSERS)
def test_any_output_is_a_message_and_is_the_same_however_it_is_divided(name: str):
    random_ = random.Random(name)
    build = builder(name)
    for _ in range(300):
        output = "".join(random_.choices(FRAGMENTS, k=random_.randrange(1, 25)))
        message = whole(build, output)
        for call in message["tool_calls"]:
            assert isinstance(json.loads(call["function"]["arguments"]), dict)
        cut = random_.randrange(len(output) + 1)
        parts = streamed(build, [output[:cut], output[cut:]])
        assert parts == streamed(build, output) == streamed(build, [output])
        if len(parts["tool_calls"]) == len(message["tool_calls"]):
            assert parts == message


@pytest.mark.parametrize("name", TOOL_PARSERS)
def test_ids_are_unique_and_as_the_models_template_wants_them(name: str):
    ids = {TOOL_PARSERS[name].new_call_id() for _ in range(100)}
    assert len(ids) == 100
    if name == "mistral":
        assert all(len(each) == 9 and each.isalnum() for each in ids)
