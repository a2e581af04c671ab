"""Every field that OpenAI or vLLM publishes is honoured, refused by name, or without effect.

The lists are kept as JSON with the versions that they are from.
"""

import ast
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer as Backend

from fairkv_jax import serve
from fairkv_jax.serve import unsupported
from fairkv_jax.serve.body import Body
from fairkv_jax.serve.messages import Message
from fairkv_jax.serve.output_format import JsonSchema, ResponseFormat, StructuredOutputs
from fairkv_jax.serve.prefixes import PrefixBody
from fairkv_jax.serve.protocol import ChatBody, CompletionBody, StreamOptions
from fairkv_jax.serve.tokenization import DetokenizeBody, TokenizeBody
from fairkv_jax.tokenizer import Tokenizer
from tests.serve.live import running
from tests.serve.scripted import ScriptedEngine
from tests.serve.test_answers import events
from tests.serve.test_bad_input import refused

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TURN = [{"role": "user", "content": "hello"}]
BODIES: dict[str, type[Body]] = {
    "chat": ChatBody,
    "completion": CompletionBody,
    "tokenize": TokenizeBody,
    "prefix": PrefixBody,
    "detokenize": DetokenizeBody,
    "message": Message,
    "stream_options": StreamOptions,
    "response_format": ResponseFormat,
    "json_schema": JsonSchema,
    "structured_outputs": StructuredOutputs,
}
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, {"messages": TURN, "max_tokens": 1}),
    "completion": (COMPLETIONS, {"prompt": "hello", "max_tokens": 1}),
    "tokenize": ("/tokenize", {"messages": TURN}),
    "prefix": ("/v1/prefixes", {"messages": TURN, "kv_policy": "streaming_llm"}),
}


def published() -> list[tuple[str, str]]:
    """The name of a body and that of a field of it, for all fields of all lists."""
    found = set()
    for name in ("vllm_fields.json", "openai_fields.json"):
        lists = json.loads((Path(__file__).parent / "published" / name).read_text())
        for fields in (lists["fields"], lists.get("earlier", {})):
            found |= {(body, field) for body, names in fields.items() for field in names}
    return sorted(found)


@pytest.mark.parametrize(("body", "field"), published())
def test_every_published_field_is_known(body: str, field: str):
    model = BODIES[body]
    names = {info.alias or name for name, info in model.model_fields.items()}
    ways = [field in names, field in model.REFUSED, field in unsupported.WITHOUT_EFFECT]
    assert sum(ways) == 1, f"{field} must be honoured, refused or without effect: {ways}"


def test_what_is_declared_is_read():
    """A field that is declared and that no code names would be accepted and ignored."""
    named = set()
    for path in Path(serve.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                named.add(node.attr)
            elif isinstance(node, ast.Constant):
                named.add(node.value)
    declared = {(name, field) for name, body in BODIES.items() for field in body.model_fields}
    assert [each for each in declared if each[1] not in named] == []


@pytest.mark.parametrize("body", REQUESTS)
def test_what_is_refused_is_refused_by_name_and_with_a_reason(client: httpx.Client, body: str):
    path, request = REQUESTS[body]
    for field, about in BODIES[body].REFUSED.items():
        error = refused(client.post(path, json={**request, field: "something"}))
        assert error["param"] == field
        assert error["message"].startswith(f"{field} is not supported by this server (")
        for neutral in (None, *about.neutral):
            response = client.post(path, json={**request, field: neutral})
            assert response.status_code == 200, (field, neutral, response.text)


@pytest.mark.parametrize(
    ("message", "part"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "'image_url'"),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "'input_audio'"),
        ({"role": "assistant", "content": "x", "refusal": "no"}, "messages.refusal"),
        ({"role": "assistant", "function_call": {"name": "f"}}, "use tool_calls"),
        ({"role": "assistant", "tool_calls": [{"type": "custom"}]}, "function"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]},
            "the arguments of the call of 'f' are not a JSON object",
        ),
    ],
)
def test_messages_with_more_than_text_are_refused(
    client: httpx.Client, message: dict[str, Any], part: str
):
    error = refused(client.post(CHAT, json={"messages": [*TURN, message], "max_tokens": 1}))
    assert error["param"] == "messages"
    assert part in error["message"]


@pytest.mark.parametrize("name", ["chat_template", "tools", "messages", "add_generation_prompt"])
def test_variables_of_the_template_that_are_not_free(client: httpx.Client, name: str):
    body = {"messages": TURN, "max_tokens": 1, "chat_template_kwargs": {name: "x"}}
    error = refused(client.post(CHAT, json=body))
    assert error["param"] == "chat_template_kwargs"
    assert f"chat_template_kwargs.{name}" in error["message"]


def test_numbers_without_a_fraction_are_integers(client: httpx.Client):
    body = {"prompt": [5.0, 6], "max_tokens": 5.0, "n": 2.0, "seed": 3.0, "stop_token_ids": [9.0]}
    answer = client.post(COMPLETIONS, json=body).json()
    assert (
        answer["usage"]
        == (client.post(COMPLETIONS, json={**body, "prompt": [5, 6], "n": 2}).json()["usage"])
    )
    assert answer["usage"]["completion_tokens"] == 10
    for wrong in (5.5, True, "5", 1e300):
        refused(client.post(COMPLETIONS, json={**body, "max_tokens": wrong}))


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_token_ids_are_returned(client: httpx.Client, chat: bool, stream: bool):
    path, prompt = (CHAT, {"messages": TURN}) if chat else (COMPLETIONS, {"prompt": ["one", "two"]})
    body = {**prompt, "max_tokens": 6, "n": 2, "seed": 4, "return_token_ids": True}
    plain = client.post(path, json=body).json()
    tokenize = {"messages": TURN} if chat else {"prompt": "one"}
    wanted = client.post("/tokenize", json=tokenize).json()["tokens"]
    texts = [c["message"]["content"] if chat else c["text"] for c in plain["choices"]]
    if stream:
        chunks = events(client, path, body)
        choices: list[list[int]] = [[] for _ in texts]
        for chunk in chunks:
            for choice in chunk["choices"]:
                choices[choice["index"]] += choice.get("token_ids", [])
        holders = [chunk if chat else chunk["choices"][0] for chunk in chunks]
        told = [each["prompt_token_ids"] for each in holders if "prompt_token_ids" in each]
        assert len(told) == (1 if chat else 4), "they come once"
    else:
        choices = [choice["token_ids"] for choice in plain["choices"]]
        told = [plain["prompt_token_ids"] if chat else plain["choices"][0]["prompt_token_ids"]]
    assert told[0] == wanted
    decoded = [client.post("/detokenize", json={"tokens": ids}).json()["prompt"] for ids in choices]
    assert decoded == texts
    bare = client.post(path, json={**prompt, "max_tokens": 1}).json()
    assert "prompt_token_ids" not in bare
    assert "token_ids" not in bare["choices"][0]


def test_tokens_are_named_by_their_ids(client: httpx.Client):
    body = {"max_tokens": 2, "return_token_ids": True, "return_tokens_as_token_ids": True}
    choice = client.post(COMPLETIONS, json={**body, "prompt": "x", "logprobs": 3}).json()
    (choice,) = choice["choices"]
    names = [f"token_id:{token_id}" for token_id in choice["token_ids"]]
    assert choice["logprobs"]["tokens"] == names
    assert all(
        name in top and all(each.startswith("token_id:") for each in top)
        for name, top in zip(names, choice["logprobs"]["top_logprobs"], strict=True)
    )
    assert choice["logprobs"]["text_offset"] == [0, 1]
    chat = {**body, "messages": TURN, "logprobs": True, "top_logprobs": 1}
    (choice,) = client.post(CHAT, json=chat).json()["choices"]
    entries = choice["logprobs"]["content"]
    assert [entry["token"] for entry in entries] == [
        f"token_id:{token_id}" for token_id in choice["token_ids"]
    ]
    text = b"".join(bytes(entry["bytes"]) for entry in entries)
    assert text.decode() == choice["message"]["content"]


def test_the_clients_id_is_the_answers_id(client: httpx.Client):
    body = {"prompt": "x", "max_tokens": 1, "request_id": "mine-1"}
    response = client.post(COMPLETIONS, json=body)
    assert response.json()["id"] == "cmpl-mine-1"
    assert response.headers["X-Request-Id"] == "mine-1"
    response = client.post(COMPLETIONS, json=body, headers={"X-Request-Id": "header"})
    assert response.json()["id"] == "cmpl-header"
    chat = {"messages": TURN, "max_tokens": 1, "request_id": "a b"}
    assert refused(client.post(CHAT, json=chat))["param"] == "request_id"
    with client.stream("POST", COMPLETIONS, json={**body, "max_tokens": 400, "stream": True}):
        assert client.post(COMPLETIONS, json=body).status_code == 200, "ids need not be unique"


TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}"
    "{% for call in m.tool_calls or [] %}"
    "<{{ call.function.name }} {{ call.function.arguments.items() | list }} {{ call.id }}>"
    "{% endfor %}{{ m.tool_call_id }}{{ m.reasoning_content }};{% endfor %}"
    "{{ documents }}{{ reasoning_effort }}{{ enable_thinking }}{{ mood }}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1, "b"]}'}}


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "[user]hello;None[assistant]"),
        ({"add_generation_prompt": False}, "[user]hello;None"),
        ({"continue_final_message": True}, "[user]hello"),
        ({"chat_template_kwargs": {"mood": "calm"}}, "[user]hello;Nonecalm[assistant]"),
        (
            {"chat_template_kwargs": {"record": 1, "self": 2, "cancelled": 3}},
            "[user]hello;None[assistant]",
        ),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "[user]hello;NoneFalse[assistant]"),
        ({"reasoning_effort": "low"}, "[user]hello;NonelowTrue[assistant]"),
        (
            {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}},
            "[user]hello;NonenoneTrue[assistant]",
        ),
        ({"documents": [{"title": "t"}]}, "[user]hello;[{'title': 't'}][assistant]"),
        (
            {"messages": [*TURN, {"role": "assistant", "tool_calls": [CALL]}]},
            "[user]hello;[assistant]<f [('a', [1, 'b'])] c1>;None[assistant]",
        ),
        (
            {
                "messages": [
                    {"role": "assistant", "content": "", "reasoning": "why", "tool_calls": []},
                    {"role": "tool", "content": "42", "tool_call_id": "c1"},
                ]
            },
            "[assistant]why;[tool]42c1;None[assistant]",
        ),
        (
            {
                "messages": [*TURN, {"role": "assistant", "content": "So "}],
                "continue_final_message": True,
                "add_generation_prompt": False,
            },
            "[user]hello;[assistant]So ",
        ),
    ],
)
def test_what_the_template_renders(checkpoint: Path, fields: dict[str, Any], text: str):
    engine = ScriptedEngine(checkpoint)
    engine.tokenizer = Tokenizer(
        Backend.from_str(engine.tokenizer.to_json()), eos_token_ids=[2], chat_template=TEMPLATE
    )
    with running(lambda: engine) as server:
        body = {"messages": TURN, **fields}
        answer = server.client.post(CHAT, json={**body, "max_tokens": 1, "return_token_ids": True})
        assert answer.status_code == 200, answer.text
        assert engine.tokenizer.decode(answer.json()["prompt_token_ids"]) == text
        tokenized = server.client.post("/tokenize", json=body).json()
        assert tokenized["tokens"] == answer.json()["prompt_token_ids"]


def test_a_message_is_either_begun_or_continued(client: httpx.Client):
    body = {"continue_final_message": True, "add_generation_prompt": True, "max_tokens": 1}
    message = refused(client.post(CHAT, json={"messages": TURN, **body}))["message"]
    assert "exclude each other" in message


def test_special_tokens_are_added_as_asked(tmp_path: Path):
    """With a vocabulary that begins texts with a token of its own."""
    from tests.oracle.tiny import write_tiny_checkpoint

    path = write_tiny_checkpoint(tmp_path / "tiny.gguf", architecture="gemma")
    engine = ScriptedEngine(path)
    with running(lambda: engine) as server:

        def tokens(**body: Any) -> list[int]:
            return server.client.post("/tokenize", json=body).json()["tokens"]

        plain = tokens(prompt="hello", add_special_tokens=False)
        assert tokens(prompt="hello") == tokens(prompt="hello", add_special_tokens=True)
        assert tokens(prompt="hello") == [2, *plain]
        for adds, wanted in ((None, [2, *plain]), (True, [2, *plain]), (False, plain)):
            body = {"prompt": "hello", "max_tokens": 1, "return_token_ids": True}
            answer = server.client.post(COMPLETIONS, json={**body, "add_special_tokens": adds})
            assert answer.json()["choices"][0]["prompt_token_ids"] == wanted
            body = {"prompt": "hello", "add_special_tokens": adds}
            prefix = server.client.post("/v1/prefixes", json=body).json()
            assert prefix["num_tokens"] == len(wanted)
