"""Tool calls and reasoning over HTTP, with the `openai` client and a model that says one thing."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from tokenizers import Tokenizer as Backend

from fairkv_jax.serve.tool_calls.mistral import MistralParser
from fairkv_jax.tokenizer import Tokenizer
from tests.serve.live import PATIENCE_S, Server, running
from tests.serve.scripted import ScriptedEngine
from tests.serve.tool_calls.reading import joined, said, without_ids

TEMPLATE = """
{%- if tools %}{{ tools | tojson }}{{ '\\n' }}{% endif %}
{%- for m in messages %}{{ m.role }}: {{ m.content }}
{%- for call in m.tool_calls or [] %}<{{ call.id }} {{ call.function | tojson }}>{% endfor %}
{%- if m.tool_call_id %}<{{ m.tool_call_id }}>{% endif %}{{ '\\n' }}{% endfor %}
{%- if add_generation_prompt %}assistant: {{ '<think>' if think else '' }}
{{- reasoning_effort }}{{ documents | tojson if documents else '' }}{% endif %}"""
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather",
        "parameters": {"type": "object", "properties": {"city": {"enum": ["Rome", "Paris"]}}},
    },
}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "get_time"}}
TURN: list[Any] = [{"role": "user", "content": "Which weather?"}]
ROME = '{"city": "Rome"}'
HERMES = (
    f'Let me see.\n<tool_call>\n{{"name": "get_weather", "arguments": {ROME}}}\n</tool_call>\n'
    '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
)


@pytest.fixture(scope="module")
def talker(checkpoint: Path) -> ScriptedEngine:
    """Its template writes tools and calls, and its end of a prompt may open the reasoning."""
    engine = ScriptedEngine(checkpoint, step_seconds=0.0)
    plain = engine.tokenizer
    engine.tokenizer = Tokenizer(
        Backend.from_str(plain.to_json()),
        eos_token_ids=plain.eos_token_ids,
        chat_template=TEMPLATE,
    )
    return engine


@pytest.fixture(scope="module")
def served(talker: ScriptedEngine) -> Iterator[Server]:
    flags = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes"}
    with running(lambda: talker, **flags, reasoning_parser="qwen3") as server:
        yield server


@pytest.fixture(scope="module")
def sdk(served: Server) -> Iterator[OpenAI]:
    url = f"{served.url}/v1"
    with OpenAI(base_url=url, api_key="none", timeout=PATIENCE_S, max_retries=0) as client:
        yield client


def ask(sdk: OpenAI, **fields: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """Every choice's message and finish reason, which are the same when they are streamed."""
    fields = {"model": "scripted", "messages": TURN, **fields}
    fields = {"extra_body": {"skip_special_tokens": True}, **fields}
    answer = sdk.chat.completions.create(**fields)
    messages = [choice.message.model_dump(exclude_unset=True) for choice in answer.choices]
    reasons = [choice.finish_reason for choice in answer.choices]
    deltas: dict[int, list[dict[str, Any]]] = {choice.index: [] for choice in answer.choices}
    logprobs: dict[int, list[Any]] = {choice.index: [] for choice in answer.choices}
    ends: dict[int, str] = {}
    for chunk in sdk.chat.completions.create(**fields, stream=True):
        for choice in chunk.choices:
            deltas[choice.index].append(_unopened(choice.delta.model_dump(exclude_unset=True)))
            logprobs[choice.index] += (choice.logprobs and choice.logprobs.content) or []
            ends |= {choice.index: choice.finish_reason} if choice.finish_reason else {}
    assert [ends[index] for index in sorted(ends)] == reasons
    for choice, message in zip(answer.choices, messages, strict=True):
        streamed = joined(deltas[choice.index])
        assert without_ids(streamed) == without_ids(message)
        assert logprobs[choice.index] == ((choice.logprobs and choice.logprobs.content) or [])
    return [without_ids(message) for message in messages], reasons


def _unopened(delta: dict[str, Any]) -> dict[str, Any]:
    """A delta without the role and the empty content that begin every message."""
    return {} if "role" in delta else delta


def test_the_model_decides_whether_it_calls_tools(sdk: OpenAI, talker: ScriptedEngine):
    talker.says = HERMES
    expected = said("Let me see.", ("get_weather", ROME), ("get_time", "{}"))
    tools = [WEATHER, CLOCK]
    messages, reasons = ask(sdk, tools=tools, n=2, logprobs=True, top_logprobs=1)
    assert (messages, reasons) == ([expected] * 2, ["tool_calls"] * 2)
    messages, _ = ask(sdk, tools=tools, tool_choice="auto", parallel_tool_calls=False)
    assert messages == [said("Let me see.", ("get_weather", ROME))]
    beginning = '<tool_call>\n{"name": "get_w'
    talker.says = f"{beginning} and more"
    cut = {"max_tokens": len(talker.tokenizer.encode(beginning))}
    assert ask(sdk, tools=tools, **cut) == ([said(beginning)], ["length"])
    talker.says = HERMES
    for fields in ({"tools": tools, "tool_choice": "none"}, {}):
        assert ask(sdk, **fields) == ([said(HERMES)], ["stop"])
    talker.says = "It is 4 < 5."
    assert ask(sdk, tools=tools) == ([said("It is 4 < 5.")], ["stop"])


def test_a_call_is_streamed_in_pieces(
    sdk: OpenAI, talker: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
):
    talker.says = HERMES
    monkeypatch.setattr(talker, "step_seconds", 0.02)  # what comes together is sent together
    tools: list[Any] = [WEATHER]
    stream = sdk.chat.completions.create(model="scripted", messages=TURN, tools=tools, stream=True)
    calls = [c for chunk in stream for c in chunk.choices[0].delta.tool_calls or []]
    first = [call for call in calls if call.index == 0]
    assert first[0].id
    assert first[0].function is not None
    assert first[0].function.name == "get_weather"
    assert all(call.id is None for call in first[1:])
    assert len(first) > len(ROME) // 2


@pytest.mark.parametrize("parser", ["hermes", "mistral"])
def test_required_and_named_calls(talker: ScriptedEngine, parser: str):
    """Without auto tool choice: a grammar, which this engine ignores, sees to the format."""
    expected = said(None, ("get_weather", ROME))
    required: dict[str, Any] = {"tools": [WEATHER, CLOCK], "tool_choice": "required"}
    with (
        running(lambda: talker, tool_call_parser=parser) as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as sdk,
    ):
        beginning = '[{"name":"get_weather","parameters":{"ci'
        talker.says = f'[{{"name":"get_weather","parameters":{ROME}}}]'
        assert ask(sdk, **required) == ([expected], ["tool_calls"])
        cut = len(talker.tokenizer.encode(beginning))
        incomplete = said(None, ("get_weather", '{"ci'))
        assert ask(sdk, **required, max_tokens=cut) == ([incomplete], ["length"])
        answer = sdk.chat.completions.create(model="scripted", messages=TURN, **required)
        calls = answer.choices[0].message.tool_calls or []
        assert (len(calls[0].id) == len(MistralParser.new_call_id())) == (parser == "mistral")
        talker.says = ROME
        named = {"type": "function", "function": {"name": "get_weather"}}
        assert ask(sdk, tools=[WEATHER, CLOCK], tool_choice=named) == ([expected], ["stop"])


def test_who_did_not_enable_it_is_told_how(talker: ScriptedEngine):
    with running(lambda: talker) as server:
        body = {"messages": TURN, "tools": [WEATHER]}
        for fields in ({}, {"tool_choice": "auto"}):
            response = server.client.post("/v1/chat/completions", json={**body, **fields})
            assert response.status_code == 400
            error = response.json()["error"]
            assert error["param"] == "tool_choice"
            assert error["message"].startswith(
                '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to '
                "be set: "
            )
        talker.says = "x"
        body["tool_choice"] = "none"
        assert server.client.post("/v1/chat/completions", json=body).status_code == 200


def prompt(served: Server, **fields: Any) -> str:
    """What the chat template makes of a conversation."""
    tokenized = served.client.post("/tokenize", json=fields)
    assert tokenized.status_code == 200, tokenized.text
    body = {"tokens": tokenized.json()["tokens"]}
    return served.client.post("/detokenize", json=body).json()["prompt"]


def test_tools_and_earlier_calls_are_in_the_prompt(served: Server):
    call = {
        "id": "c1",
        "type": "function",
        "function": {"name": "get_weather", "arguments": ROME},
    }
    messages = [
        *TURN,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "rain"}]},
    ]
    text = prompt(served, messages=messages, tools=[CLOCK])
    assert text == (
        '[{"type": "function", "function": {"name": "get_time"}}]\n'
        "user: Which weather?\n"
        'assistant: <c1 {"name": "get_weather", "arguments": {"city": "Rome"}}>\n'
        "tool: rain<c1>\n"
        "assistant: "
    )


def test_a_prefix_with_tools_is_continued_by_chats_with_the_same_tools(
    served: Server, talker: ScriptedEngine
):
    talker.says = "x"
    system = [{"role": "system", "content": "be brief"}]
    policy = {"kv_policy": "streaming_llm"}
    body = {"messages": system, "tools": [WEATHER], **policy}
    prefix = served.client.post("/v1/prefixes", json=body)
    assert prefix.status_code == 200, prefix.text
    body = {"messages": TURN, "prefix_id": prefix.json()["id"], **policy}
    same = served.client.post("/v1/chat/completions", json={**body, "tools": [WEATHER]})
    assert same.status_code == 200, same.text
    other = served.client.post("/v1/chat/completions", json={**body, "tools": [CLOCK]})
    assert other.status_code == 400
    assert "differently" in other.json()["error"]["message"]


def test_a_prefix_is_rendered_with_the_variables_of_its_template(served: Server):
    def tokens(path: str, **fields: Any) -> int:
        answer = served.client.post(path, json={"messages": TURN, **fields})
        assert answer.status_code == 200, answer.text
        return answer.json()["num_tokens" if path == "/v1/prefixes" else "count"]

    policy = {"kv_policy": "streaming_llm"}
    think = {"chat_template_kwargs": {"think": True}}
    variants: list[dict[str, Any]] = [
        {"add_generation_prompt": False},
        {"add_generation_prompt": True},
        {"add_generation_prompt": True, **think},
        {"add_generation_prompt": True, "reasoning_effort": "high"},
        {"add_generation_prompt": True, "documents": [{"title": "a long title"}]},
        {"continue_final_message": True},
    ]
    counts = [tokens("/v1/prefixes", **policy, **fields) for fields in variants]
    assert counts == [tokens("/tokenize", **fields) for fields in variants]
    assert len(set(counts)) == len(counts)
    assert tokens("/v1/prefixes", **policy) == counts[0]


def test_reasoning_is_told_from_the_answer(sdk: OpenAI, talker: ScriptedEngine):
    talker.says = f"<think>\nHm.\n</think>\n\n{HERMES}"
    thought, answer = "\nHm.\n", f"\n\n{HERMES}"
    expected = said("\n\nLet me see.", ("get_weather", ROME), ("get_time", "{}"), reasoning=thought)
    assert ask(sdk, tools=[WEATHER, CLOCK]) == ([expected], ["tool_calls"])
    assert ask(sdk) == ([said(answer, reasoning=thought)], ["stop"])
    hidden = {"include_reasoning": False}
    assert ask(sdk, extra_body=hidden) == ([said(answer)], ["stop"])
    talker.says = "Hm.</think>4"
    opened = {"chat_template_kwargs": {"think": True}}
    assert ask(sdk, extra_body=opened) == ([said("4", reasoning="Hm.")], ["stop"])


def reasoning_tokens(sdk: OpenAI, **fields: Any) -> int | None:
    """What the usage of two choices says, which is the same when they are streamed."""
    fields = {"model": "scripted", "messages": TURN, "n": 2, **fields}
    usage = sdk.chat.completions.create(**fields).usage
    assert usage is not None
    assert usage.completion_tokens_details is not None
    fields["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(sdk.chat.completions.create(**fields, stream=True))
    assert chunks.pop().usage == usage
    counts: list[list[int]] = [[], []]
    for chunk in chunks:
        choice = chunk.choices[0]
        if chunk.usage is not None and "role" not in choice.delta.model_dump(exclude_unset=True):
            assert chunk.usage.completion_tokens_details is not None
            counts[choice.index].append(chunk.usage.completion_tokens_details.reasoning_tokens or 0)
    for each in counts:
        assert each == sorted(each)
    assert sum(each[-1] for each in counts) == usage.completion_tokens_details.reasoning_tokens
    return usage.completion_tokens_details.reasoning_tokens


def test_tokens_of_the_reasoning_are_counted(sdk: OpenAI, talker: ScriptedEngine):
    """Those of the end marker too; a token that reaches into the answer is counted."""
    talker.says = "<think>\nHm, 漢字.\n</think>\n\n4 < 5."
    tokenizer = talker.tokenizer
    token_ids = tokenizer.encode(talker.says)
    until = next(
        count
        for count in range(len(token_ids))
        if "</think>" in tokenizer.decode(token_ids[:count], skip_special_tokens=False)
    )
    assert until < len(token_ids)
    assert reasoning_tokens(sdk) == 2 * until
    assert reasoning_tokens(sdk, logprobs=True) == 2 * until
    assert reasoning_tokens(sdk, extra_body={"include_reasoning": False}) == 2 * until
    assert reasoning_tokens(sdk, max_tokens=until - 1) == 2 * (until - 1)
    talker.says = "4 < 5."
    assert reasoning_tokens(sdk) == 0


def test_nothing_is_said_of_reasoning_where_nothing_looks_for_it(client: httpx.Client):
    body = {"messages": TURN, "max_tokens": 2}
    usage = client.post("/v1/chat/completions", json=body).json()["usage"]
    assert "reasoning_tokens" not in usage["completion_tokens_details"]


DEEP: dict[str, Any] = {"type": "object"}
for _ in range(100):
    DEEP = {"type": "object", "properties": {"a": DEEP}}


def function(name: Any, parameters: Any = None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


@pytest.mark.parametrize(
    ("fields", "param", "sentence"),
    [
        ({"tools": []}, "tools", "at least 1"),
        ({"tools": [CLOCK] * 129}, "tools", "at most 128"),
        ({"tools": [{"type": "web_search"}]}, "tools", "'function'"),
        ({"tools": [{"type": "function"}]}, "tools", "Field required"),
        ({"tools": [function("")]}, "tools", "at least 1 character"),
        ({"tools": [function("a\nb")]}, "tools", "'a\\nb'"),
        ({"tools": [WEATHER, CLOCK, WEATHER]}, "tools", "2 functions have the name 'get_weather'"),
        ({"tools": [function("f", {"type": "string"})]}, "tools", "have the type 'string'"),
        ({"tools": [function("f", [])]}, "tools", "dictionary"),
        ({"tools": [function("f", DEEP)]}, "tools", "more than 64 levels deep"),
        (
            {"tools": [function("f", {"properties": {"a": {"type": "strin"}}})]},
            "tools",
            "the type 'strin' is none of",
        ),
        ({"tools": [function("f", {"required": "a"})]}, "tools", "required must be a list"),
        ({"tools": [function("f", {"properties": ["a"]})]}, "tools", "properties must be an obj"),
        ({"tools": [function("f", {"anyOf": [5]})]}, "tools", "5 stands where a schema must be"),
        ({"tool_choice": "auto"}, "tool_choice", "'auto' needs tools"),
        ({"tool_choice": "sometimes", "tools": [CLOCK]}, "tool_choice", "got 'sometimes'"),
        ({"tool_choice": {"type": "function"}, "tools": [CLOCK]}, "tool_choice", "got {'type'"),
        (
            {"tool_choice": function("get_tim"), "tools": [CLOCK]},
            "tool_choice",
            "no function 'get_tim' in tools, which has 'get_time'",
        ),
        (
            {"tool_choice": "required", "tools": [CLOCK], "guided_regex": "a"},
            None,
            "only one field may constrain the output, got tool_choice, guided_regex",
        ),
        (
            {"tool_choice": "required", "tools": [function("f", {"$ref": "#/$defs/no"})]},
            "tool_choice",
            "tool_choice: ",
        ),
    ],
)
def test_wrong_tools(served: Server, fields: dict, param: str | None, sentence: str):
    response = served.client.post("/v1/chat/completions", json={"messages": TURN, **fields})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert sentence in error["message"]
    assert len(error["message"]) < 500


def test_a_format_for_the_answer_does_not_stand_in_the_way_of_a_call(
    client: httpx.Client, sdk: OpenAI, talker: ScriptedEngine
):
    talker.says = f'[{{"name":"get_weather","parameters":{ROME}}}]'
    form = {"type": "json_object"}
    messages, _ = ask(sdk, tools=[WEATHER], tool_choice="required", response_format=form)
    assert messages == [said(None, ("get_weather", ROME))]


def test_a_client_that_cannot_be_served_gets_its_own_exception(sdk: OpenAI):
    with pytest.raises(openai.BadRequestError, match="no function 'x' in tools") as bad:
        sdk.chat.completions.create(
            model="scripted",
            messages=TURN,
            tools=[WEATHER],  # pyright: ignore[reportArgumentType]
            tool_choice={"type": "function", "function": {"name": "x"}},
        )
    assert bad.value.param == "tool_choice"
