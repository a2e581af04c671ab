"""/v1/prefixes, and requests that begin with a prefix, over an engine without a model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serve.live import running
from tests.serve.scripted import ScriptedEngine

PREFIXES = "/v1/prefixes"
DOCUMENT = [8, 9, 10] * 10
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
