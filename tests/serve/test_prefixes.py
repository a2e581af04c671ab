"""/v1/prefixes, and requests that begin with a prefix, over an engine without a model."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from fairkv_jax.engine.request import Request, ValidatedRequest
from tests.serve.live import running
from tests.serve.scripted import ScriptedEngine

PREFIXES = "/v1/prefixes"
DOCUMENT = [8, 9, 10] * 10
TURN = {"role": "user", "content": "the wall"}
POLICY = {"kv_policy": "streaming_llm", "kv_budget": 20}


@pytest.fixture
def with_keys(checkpoint: Path) -> Iterator[tuple[httpx.Client, httpx.Client]]:
    """Clients with two different API keys of one server."""
    with running(lambda: ScriptedEngine(checkpoint), api_keys=("one", "two")) as server:
        clients = [
            httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {key}"})
            for key in ("one", "two")
        ]
        with clients[0] as one, clients[1] as two:
            yield one, two


def create(client: httpx.Client, **body: Any) -> dict[str, Any]:
    response = client.post(PREFIXES, json={"prompt": DOCUMENT, **POLICY} | body)
    assert response.status_code == 200, response.text
    return response.json()


def test_a_prefix_is_created_shown_listed_and_deleted(client: httpx.Client):
    prefix = create(client)
    assert prefix == {
        "id": prefix["id"],
        "object": "prefix",
        "num_tokens": 30,
        "kept_tokens": 20.0,
        "bytes": 20_000,
    }
    assert create(client) == prefix
    other = create(client, kv_budget=10)
    assert other["id"] != prefix["id"]
    assert create(client, cache_salt="mine")["id"] not in (prefix["id"], other["id"])
    assert client.get(f"{PREFIXES}/{prefix['id']}").json() == prefix
    listed = client.get(PREFIXES).json()
    assert listed["object"] == "list"
    assert listed["data"][:2] == [prefix, other]
    assert client.delete(f"{PREFIXES}/{prefix['id']}").status_code == 204
    for method in ("GET", "DELETE"):
        response = client.request(method, f"{PREFIXES}/{prefix['id']}")
        assert response.status_code == 404
        assert "there is no prefix" in response.json()["error"]["message"]


@pytest.mark.parametrize("chat", [False, True])
def test_a_prompt_is_only_what_follows_the_prefix(client: httpx.Client, chat: bool):
    turns = [{"role": "user", "content": text} for text in ("the wall", "the inn")]
    if chat:
        path, whole, rest = "/v1/chat/completions", {"messages": turns}, {"messages": turns[1:]}
        prefix = create(client, prompt=None, messages=turns[:1])
    else:
        path, whole, rest = "/v1/completions", {"prompt": [*DOCUMENT, 5]}, {"prompt": [5]}
        prefix = create(client)
    usages = [
        client.post(path, json={**body, "max_tokens": 3}).json()["usage"]["prompt_tokens"]
        for body in (whole, {**rest, "prefix_id": prefix["id"]})
    ]
    assert usages[0] == usages[1] > prefix["num_tokens"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "give either prompt or messages"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "give either"),
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": "a", "kv_ratio": 1.0}, "kv_ratio"),
        ({"prompt": DOCUMENT * 4}, "can only share prefixes that are kept whole"),
        ({"prompt": "a", "model": "other"}, "does not exist"),
        (
            {"messages": [TURN], "chat_template_kwargs": {"tools": []}},
            "chat_template_kwargs.tools is not supported",
        ),
    ],
)
def test_bad_prefixes_are_refused(client: httpx.Client, body: dict[str, Any], said: str):
    response = client.post(PREFIXES, json=body)
    assert response.status_code in (400, 404)
    assert said in response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_an_unknown_prefix_is_not_found(client: httpx.Client, path: str):
    prompt = {"prompt": "a", "messages": [{"role": "user", "content": "b"}]}
    response = client.post(path, json={**prompt, "prefix_id": "nobody"})
    assert response.status_code == 404
    assert "there is no prefix 'nobody'" in response.json()["error"]["message"]


def test_an_api_key_sees_only_its_own_prefixes(with_keys: tuple[httpx.Client, httpx.Client]):
    one, two = with_keys
    prefix = create(one)
    assert two.get(PREFIXES).json()["data"] == []
    for method in ("GET", "DELETE"):
        assert two.request(method, f"{PREFIXES}/{prefix['id']}").status_code == 404
    body = {"prompt": "a", "prefix_id": prefix["id"]}
    assert two.post("/v1/completions", json=body).status_code == 404
    assert one.post("/v1/completions", json=body).status_code == 200
    assert create(two)["id"] != prefix["id"]
    assert httpx.get(f"{one.base_url}{PREFIXES}").status_code == 401


class Recording(ScriptedEngine):
    """Caches prefixes as far as the server can tell, and keeps what it has been asked."""

    def __init__(self, checkpoint: Path):
        super().__init__(checkpoint)
        self.engine_config = replace(self.engine_config, enable_prefix_caching=True)
        self.asked: list[Request] = []

    def validate(self, request: Request) -> ValidatedRequest:
        self.asked.append(request)
        return super().validate(request)


MARKED = {"type": "text", "text": "the wall and the inn", "cache_control": {"type": "ephemeral"}}
CHAT = {
    "messages": [
        {"role": "user", "content": [MARKED, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": "the end"},
        {"role": "user", "content": "and then?"},
    ],
    "max_tokens": 2,
}


def test_marks_and_turns_divide_a_chat(checkpoint: Path):
    """For the requests of its API key and its salt; all choices have one prompt."""
    engine = Recording(checkpoint)
    with running(lambda: engine, api_keys=("one", "two")) as server:
        for key, body in (("one", {"n": 2}), ("two", {"cache_salt": "mine"})):
            response = server.client.post(
                "/v1/chat/completions",
                json=CHAT | body,
                headers={"Authorization": f"Bearer {key}"},
            )
            assert response.status_code == 200, response.text
    first, second, other = engine.asked
    decode = engine.tokenizer.decode
    ends = [decode(first.prompt_token_ids[: each.position]) for each in first.boundaries]
    assert [end[-8:] for end in ends] == [" the inn", "sistant\n", "t\nthe en"]
    assert [each.is_marked for each in first.boundaries] == [True, False, False]
    assert [each.ends_answer for each in first.boundaries] == [False, False, True]
    assert first.boundaries == second.boundaries == other.boundaries
    assert first.may_continue
    assert first.same_prompt == second.same_prompt != ""
    assert (other.same_prompt, other.cache_salt) == ("", "mine")
    assert first.owner == second.owner != other.owner


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"cache_salt": ""}, "cache_salt"),
        (
            {"messages": [{"role": "user", "content": "a", "cache_control": {"type": "x"}}]},
            "ephemeral",
        ),
    ],
)
def test_bad_marks_and_salts_are_refused(client: httpx.Client, change: dict[str, Any], said: str):
    response = client.post("/v1/chat/completions", json=CHAT | change)
    assert response.status_code == 400
    assert said in response.json()["error"]["message"]


def test_marks_are_ignored_where_nothing_is_cached(client: httpx.Client):
    assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
