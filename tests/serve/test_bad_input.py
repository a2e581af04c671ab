"""What a client can get wrong: always 4xx, in OpenAI's shape, and the server goes on."""

import json
import secrets
import socket
from hashlib import sha256
from secrets import compare_digest
from typing import Any

import httpx
import pytest

from fairkv_jax.serve.unsupported import PATHS
from tests.serve.live import Server, running
from tests.serve.scripted import ScriptedEngine

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
TURN = [{"role": "user", "content": "hello"}]
JSON = {"Content-Type": "application/json"}


def refused(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    """The error, once its shape has been checked."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == status
    assert error["message"]
    return error


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", ""),
        ("prompt", []),
        ("prompt", [[]]),
        ("prompt", ["fine", ""]),
        ("prompt", 5),
        ("prompt", None),
        ("prompt", [1, "two"]),
        ("prompt", [1.5]),
        ("prompt", [True]),
        ("prompt", "\ud800"),
        ("prompt", [1] * 600),
        ("prompt", "x" * 1_000_000),
        ("max_tokens", "many"),
        ("max_tokens", "5"),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 2.5),
        ("max_tokens", True),
        ("max_tokens", 10**30),
        ("temperature", "hot"),
        ("temperature", -0.1),
        ("temperature", 10**400),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_k", -2),
        ("min_p", 2),
        ("n", 0),
        ("n", 1000),
        ("seed", 2**70),
        ("stop", [""]),
        ("stop", 3),
        ("stop_token_ids", [-1]),
        ("logprobs", 21),
        ("logprobs", -1),
        ("stream", "yes"),
        ("kv_budget", 65),
        ("kv_budget", 0),
        ("kv_budget", 1.5),
        ("kv_ratio", 1.0),
        ("kv_ratio", -0.1),
        ("kv_policy", "h2o"),
        ("kv_policy", "full"),
        ("stream_options", {"include_usage": "yes"}),
        ("frequency_penalty", 2.5),
        ("presence_penalty", "1"),
        ("repetition_penalty", 0),
        ("min_tokens", 3),  # more than max_tokens
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"-5": 1}),
        ("logit_bias", {"\u0665": 1}),
        ("logit_bias", {"5" * 30: 1}),
        ("logit_bias", {"5": None}),
        ("logit_bias", {str(i): 1 for i in range(301)}),
        ("prompt_logprobs", 21),
        ("response_format", {"type": "yaml"}),
        ("response_format", {"type": "json_schema"}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x"}}),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": {}}}),
        ("structured_outputs", {}),
        ("structured_outputs", {"regex": "a", "choice": ["a"]}),
        ("structured_outputs", {"structural_tag": "x"}),
        ("structured_outputs", {"regex": "a", "disable_any_whitespace": 1}),
        ("guided_choice", []),
        ("guided_choice", "yes"),
        ("guided_json", 5),
        ("guided_regex", "x" * 131_073),
        ("guided_regex", "\ud800"),
        ("guided_whitespace_pattern", " "),
        ("allowed_token_ids", [5]),
        ("bad_words", ["no"]),
        ("best_of", 2),
    ],
)
def test_a_wrong_field_of_a_completion(client: httpx.Client, field: str, value: Any):
    body = json.dumps({"prompt": "hello", "max_tokens": 2, field: value})
    error = refused(client.post(COMPLETIONS, content=body, headers=JSON))
    assert error["type"] == "BadRequestError"
    assert len(error["message"]) < 500


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("messages", [], "messages"),
        ("messages", "hello", "messages"),
        ("messages", [{"role": "user", "content": 5}], "messages"),
        ("messages", [{"content": "no role"}], "messages"),
        ("messages", [{"role": "user", "content": [{"type": "image_url"}]}], "messages"),
        ("max_completion_tokens", 0, "max_completion_tokens"),
        ("top_logprobs", 21, "top_logprobs"),
        ("logprobs", 1, "logprobs"),
        ("tools", [{"type": "function"}], "tools"),
        ("echo", True, "echo"),
        ("logit_bias", {"a": 1}, "logit_bias"),
        ("prompt_logprobs", -1, "prompt_logprobs"),
        ("response_format", {"type": "xml"}, "response_format"),
        ("structured_outputs", {"whitespace_pattern": " "}, "structured_outputs"),
        ("guided_regex", "[a-", "guided_regex"),
        ("guided_json", {"type": "objekt"}, "guided_json"),
        ("guided_json", "{", "guided_json"),
        ("guided_grammar", "start: nothing", "guided_grammar"),
        ("structured_outputs", {"regex": "("}, "structured_outputs"),
        (
            "response_format",
            {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "objekt"}}},
            "response_format",
        ),
    ],
)
def test_a_wrong_field_of_a_chat_is_named(client: httpx.Client, field: str, value: Any, param: str):
    body = {"messages": TURN, "max_tokens": 2, field: value}
    assert refused(client.post(CHAT, json=body))["param"] == param


LARGE = {"properties": {f"p{index}": {"type": "string"} for index in range(10_000)}}
FUNCTION = {"name": "f", "parameters": {"properties": dict([*LARGE["properties"].items()][:5000])}}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("guided_json", LARGE),
        ("guided_json", json.dumps(LARGE)),
        ("structured_outputs", {"json": LARGE, "disable_additional_properties": False}),
        (
            "response_format",
            {"type": "json_schema", "json_schema": {"name": "x", "schema": LARGE}},
        ),
        (
            "tools",
            [{"type": "function", "function": {**FUNCTION, "name": name}} for name in "fg"],
        ),
    ],
)
def test_schemas_that_would_occupy_the_server_are_refused(
    client: httpx.Client, field: str, value: Any
):
    error = refused(client.post(CHAT, json={"messages": TURN, "max_tokens": 2, field: value}))
    assert "consist of more than 10000 objects" in error["message"]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_stop_strings_are_few_and_short(client: httpx.Client, path: str):
    body = {"prompt": "hello", "messages": TURN, "max_tokens": 2}
    for stop in (["?"] * 65, "x" * 1001, ["?", "x" * 1001]):
        error = refused(client.post(path, json={**body, "stop": stop}))
        assert error["param"] == "stop"
        assert "at most 64 stop strings of 1000 characters" in error["message"]
    for stop in (["?"] * 64, "x" * 1000):
        assert client.post(path, json={**body, "stop": stop}).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"{'prompt': 'x'}",
        b'{"prompt": "\xff"}',
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x", "temperature": Infinity}',
        b'{"prompt": "x", "unknown": NaN}',
        b'{"prompt": "x", "temperature": 1e999}',
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"prompt": "x", "max_tokens": ' + b"9" * 10_000 + b"}",
    ],
    ids=lambda body: repr(body[:40]),
)
def test_what_is_not_json(client: httpx.Client, body: bytes):
    refused(client.post(COMPLETIONS, content=body, headers=JSON))


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (COMPLETIONS, '{"model": "\\ud800", "prompt": "x"}', "model"),
        (COMPLETIONS, '{"prompt": ["fine", "\\uDC00!"]}', "prompt"),
        (COMPLETIONS, '{"prompt": "x", "stop": "\\ud83d"}', "stop"),
        (COMPLETIONS, '{"prompt": "x", "kv_policy": "\\ud83d\\ud83d"}', "kv_policy"),
        (COMPLETIONS, '{"prompt": "x", "guided_json": {"enum": ["\\ud800"]}}', "guided_json"),
        (COMPLETIONS, '{"prompt": "x", "\\ud800": 1}', None),
        (CHAT, '{"messages": [{"role": "user", "content": "\\ud83d"}]}', "messages"),
        (CHAT, '{"messages": [{"role": "\\ud83d", "content": "x"}]}', "messages"),
        ("/tokenize", '{"prompt": "a\\ud83db"}', "prompt"),
        ("/tokenize", '{"model": "\\ud83d", "prompt": "x"}', "model"),
        ("/detokenize", '{"model": "\\ud83d", "tokens": [5]}', "model"),
        ("/v1/prefixes", '{"cache_salt": "\\ud83d", "prompt": "x"}', "cache_salt"),
    ],
)
def test_half_a_character_is_refused_in_every_field(
    client: httpx.Client, path: str, body: str, param: str | None
):
    error = refused(client.post(path, content=body, headers=JSON))
    assert error["param"] == param
    assert "unpaired surrogate" in error["message"]


def test_whole_characters_and_backslashes_are_taken(client: httpx.Client):
    body = '{"prompt": "\\ud83d\\ude00 \\\\ud83d", "max_tokens": 1, "user": "\\uD83D\\uDE00"}'
    response = client.post(COMPLETIONS, content="\ufeff" + body, headers=JSON)
    assert response.status_code == 200, response.text
    for encoded in (body.encode("utf-16"), b'{"prompt": "\xed\xa0\xbd"}'):
        message = refused(client.post(COMPLETIONS, content=encoded, headers=JSON))["message"]
        assert message == "the body is not UTF-8"


@pytest.mark.parametrize("encoding", ["gzip", "br", "gzip, identity"])
def test_compressed_bodies_are_refused(client: httpx.Client, encoding: str):
    import gzip

    content = gzip.compress(b'{"prompt": "x", "max_tokens": 1}')
    headers = {**JSON, "Content-Encoding": encoding}
    error = refused(client.post(COMPLETIONS, content=content, headers=headers), 415)
    assert "Content-Encoding" in error["message"]
    plain = {**JSON, "Content-Encoding": "identity"}
    body = {"prompt": "x", "max_tokens": 1}
    assert client.post(COMPLETIONS, json=body, headers=plain).status_code == 200


def test_the_type_of_the_body_is_said(client: httpx.Client):
    error = refused(client.post(COMPLETIONS, content=b'{"prompt": "x"}'), 415)
    assert "application/json" in error["message"]


def test_ranges_are_explained_and_prompts_are_not_quoted(client: httpx.Client):
    body = {"prompt": "my secret", "temperature": -1, "max_tokens": 1}
    message = refused(client.post(COMPLETIONS, json=body))["message"]
    assert "temperature must be a finite number at least 0, got -1" in message
    assert "secret" not in message
    wrong = {"prompt": ["my secret", 5]}
    assert "secret" not in refused(client.post(COMPLETIONS, json=wrong))["message"]


def test_a_faulty_schema_is_explained(client: httpx.Client):
    schema = {"type": "object", "properties": {"a": {"type": "strin"}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    message = refused(client.post(CHAT, json={"messages": TURN, "response_format": form}))[
        "message"
    ]
    assert message == "response_format: Invalid type: strin"


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 0},
        {"min_tokens": 20},
        {"prompt_logprobs": 1, "stream": True},
        {"guided_regex": "a", "response_format": {"type": "json_object"}},
        {"guided_regex": "a", "guided_choice": ["a"]},
    ],
)
def test_fields_that_contradict_each_other(client: httpx.Client, fields: dict[str, Any]):
    refused(client.post(COMPLETIONS, json={"prompt": "hello", **fields}))


def test_neutral_values_and_unknown_fields_are_taken(client: httpx.Client):
    body = {
        "prompt": "hello",
        "max_tokens": 1,
        "temperature": 0,
        "frequency_penalty": 0,
        "logit_bias": {},
        "echo": False,
        "min_tokens": 0,
        "guided_regex": None,
        "n": 1,
        "user": "someone",
        "x_new_field": {"deep": [1]},
        "seed": None,
        "response_format": {"type": "text"},
    }
    assert client.post(COMPLETIONS, json=body).status_code == 200


def test_another_model_and_other_paths_are_not_found(client: httpx.Client):
    error = refused(client.post(COMPLETIONS, json={"model": "gpt", "prompt": "x"}), 404)
    assert (error["type"], error["param"]) == ("NotFoundError", "model")
    assert "`gpt`" in error["message"]
    refused(client.post(CHAT, json={"model": "gpt", "messages": TURN}), 404)
    refused(client.get("/v2/nothing"), 404)
    refused(client.get(COMPLETIONS), 405)


@pytest.mark.parametrize("path", PATHS)
def test_other_apis_are_refused_by_name(client: httpx.Client, path: str):
    """With a 400: proxies take a 404 for a deployment that is gone."""
    for response in (client.post(path, json={"input": "x"}), client.get(f"{path}/some/thing")):
        assert f"{path} is not supported by this server" in refused(response)["message"]


def test_bad_requests_reach_no_engine(client: httpx.Client, scripted: ScriptedEngine):
    before = len(scripted.generated)
    refused(client.post(COMPLETIONS, json={"prompt": ["fine", [1] * 600]}))
    assert len(scripted.generated) == before
    assert client.post(COMPLETIONS, json={"prompt": "x", "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_over_the_limit(scripted: ScriptedEngine, declared: bool):
    with running(lambda: scripted, max_request_bytes=1000) as server:
        text = json.dumps({"prompt": "x" * 2000}).encode()
        content = text if declared else iter([text[:500], text[500:]])
        error = refused(server.client.post(COMPLETIONS, content=content, headers=JSON), 413)
        assert "1000 bytes" in error["message"]
        small = {"prompt": "x", "max_tokens": 1}
        assert server.client.post(COMPLETIONS, json=small).status_code == 200


def test_half_a_request_harms_nobody(server: Server):
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as half:
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n")
        half.sendall(b"Content-Type: application/json\r\n\r\n{")
        body = {"prompt": "x", "max_tokens": 1}
        assert server.client.post(COMPLETIONS, json=body).status_code == 200


def test_keys_are_asked_for(scripted: ScriptedEngine):
    body = {"prompt": "x", "max_tokens": 1}
    with running(lambda: scripted, api_keys=("one", "zwei")) as server:
        for header in (None, "Bearer three", "Basic one", "Bearer", "one", "Bearer \xe9"):
            headers = [(b"Authorization", header.encode("latin-1"))] if header else []
            refused(server.client.post(COMPLETIONS, json=body, headers=headers), 401)
        for key in ("one", "zwei"):
            headers = {"Authorization": f"Bearer {key}"}
            response = server.client.post(COMPLETIONS, json=body, headers=headers)
            assert response.status_code == 200
        assert server.client.get("/health").status_code == 200
        refused(server.client.get("/v1/models"), 401)


def test_keys_are_compared_in_constant_time_with_every_one(
    scripted: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
):
    compared: list[bytes] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(other)
        return compare_digest(one, other)

    monkeypatch.setattr(secrets, "compare_digest", compare)
    keys = ("one", "zwei", "trois")
    with running(lambda: scripted, api_keys=keys) as server:
        for key, status in (("one", 200), ("trois", 200), ("four", 401)):
            compared.clear()
            headers = {"Authorization": f"Bearer {key}"}
            assert server.client.get("/v1/models", headers=headers).status_code == status
            assert compared == [sha256(each.encode()).digest() for each in keys]
