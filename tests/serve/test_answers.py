"""Answers: streaming tells the same as not streaming, and counts are right."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serve.live import running
from tests.serve.scripted import ScriptedEngine

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
TURN = [{"role": "user", "content": "hello"}]


def events(client: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The chunks of a stream, up to [DONE]."""
    with client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def gathered(chunks: list[dict[str, Any]], choices: int, chat: bool) -> list[dict[str, Any]]:
    """Per choice its text, finish reason and log-probabilities, put together again."""
    whole: list[dict[str, Any]] = [{"text": "", "logprobs": {}} for _ in range(choices)]
    for chunk in chunks:
        for choice in chunk["choices"]:
            one = whole[choice["index"]]
            assert "finish_reason" not in one, "nothing may follow the last chunk of a choice"
            one["text"] += choice["delta"].get("content", "") if chat else choice["text"]
            for name, values in (choice["logprobs"] or {}).items():
                one["logprobs"].setdefault(name, []).extend(values)
            if choice["finish_reason"]:
                one["finish_reason"] = choice["finish_reason"]
    return whole


def flat(answer: dict[str, Any], chat: bool) -> list[dict[str, Any]]:
    return [
        {
            "text": choice["message"]["content"] if chat else choice["text"],
            "logprobs": choice["logprobs"] or {},
            "finish_reason": choice["finish_reason"],
        }
        for choice in answer["choices"]
    ]


@pytest.mark.parametrize("logprobs", [None, 0, 3])
@pytest.mark.parametrize("options", [{}, {"stop": ["uv", "zzz"]}, {"n": 2, "seed": 7}])
@pytest.mark.parametrize("chat", [False, True])
def test_streaming_equals_not_streaming(
    client: httpx.Client, chat: bool, options: dict[str, Any], logprobs: int | None
):
    body: dict[str, Any] = {"max_tokens": 12, "stream_options": {"include_usage": True}, **options}
    if chat:
        path, prompt = CHAT, {"messages": TURN}
        wanted = {} if logprobs is None else {"logprobs": True, "top_logprobs": logprobs}
    else:
        path, prompt, wanted = COMPLETIONS, {"prompt": ["one", "two"]}, {"logprobs": logprobs}
    body |= prompt | wanted
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    answer = response.json()
    chunks = events(client, path, body)
    assert gathered(chunks, len(answer["choices"]), chat) == flat(answer, chat)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == answer["usage"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert len({chunk["id"] for chunk in chunks}) == 1
    if chat:
        assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}


def test_the_four_forms_of_a_prompt(client: httpx.Client):
    def answer(prompt: Any) -> dict[str, Any]:
        return client.post(COMPLETIONS, json={"prompt": prompt, "max_tokens": 4}).json()

    ids = client.post("/tokenize", json={"prompt": "hello"}).json()["tokens"]
    text = answer("hello")["choices"][0]["text"]
    assert len(text) == 4
    for prompt in (["hello"], ids, [ids]):
        assert [choice["text"] for choice in answer(prompt)["choices"]] == [text]
    several = answer(["hello", "other", "hello"])["choices"]
    assert [choice["index"] for choice in several] == [0, 1, 2]
    assert several[0]["text"] == several[2]["text"] == text
    assert several[1]["text"] != text


def test_every_prompt_is_validated_once(client: httpx.Client, scripted: ScriptedEngine):
    """The thread of the engine does not repeat what the event loop has checked."""
    before = scripted.num_validated
    body = {"prompt": [[5, 6, 7], [8] * 100], "n": 2, "max_tokens": 2}
    assert client.post(COMPLETIONS, json=body).status_code == 200
    assert scripted.num_validated == before + 4
    assert client.post(CHAT, json={"messages": TURN, "max_tokens": 2}).status_code == 200
    assert scripted.num_validated == before + 5


def test_usage_counts_each_prompt_once(client: httpx.Client):
    body = {"prompt": [[5, 6, 7], [8] * 100], "n": 2, "max_tokens": 5, "seed": 1}
    usage = client.post(COMPLETIONS, json=body).json()["usage"]
    assert usage == {
        "prompt_tokens": 103,
        "completion_tokens": 20,
        "total_tokens": 123,
        "prompt_tokens_details": {
            "cached_tokens": 0,
            "text_tokens": 103,
            "audio_tokens": 0,
            "image_tokens": 0,
        },
        "completion_tokens_details": {
            "text_tokens": 20,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
        "kept_prompt_tokens": 3 + 64,
    }


@pytest.mark.parametrize("chat", [False, True])
def test_requests_may_keep_less_and_are_told_how_much(client: httpx.Client, chat: bool):
    def kept(**more: Any) -> float:
        prompt = {"messages": TURN * 30} if chat else {"prompt": [8] * 100}
        body = {**prompt, "max_tokens": 1, **more}
        return client.post(CHAT if chat else COMPLETIONS, json=body).json()["usage"][
            "kept_prompt_tokens"
        ]

    assert (kept(), kept(kv_budget=20), kept(kv_budget=64)) == (64, 20, 64)
    assert kept(kv_policy="streaming_llm", kv_budget=30) == 30
    if not chat:
        assert kept(kv_ratio=0.75) == 25


def test_usage_so_far_comes_with_every_chunk_where_asked_for(client: httpx.Client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    for path, prompt in ((COMPLETIONS, {"prompt": [5, 6, 7]}), (CHAT, {"messages": TURN})):
        chunks = events(client, path, {**prompt, "max_tokens": 6, "stream_options": options})
        counts = [c["usage"]["completion_tokens"] for c in chunks]
        assert counts == sorted(counts)
        assert counts[0] == (0 if path == CHAT else 1), "a chat's first chunk names the role only"
        assert len({c["usage"]["prompt_tokens"] for c in chunks}) == 1
        assert counts[-1] == 6


def test_usage_is_streamed_only_when_asked_for(client: httpx.Client):
    chunks = events(client, COMPLETIONS, {"prompt": "x", "max_tokens": 3})
    assert all("usage" not in chunk for chunk in chunks)
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_stop_strings_end_the_text_and_are_named(client: httpx.Client):
    full = client.post(COMPLETIONS, json={"prompt": "x", "max_tokens": 8}).json()["choices"][0]
    assert full["finish_reason"] == "length"
    stop = full["text"][3:5]
    body = {"prompt": "x", "max_tokens": 8, "stop": stop}
    cut = client.post(COMPLETIONS, json=body).json()["choices"][0]
    assert cut["text"] == full["text"].split(stop)[0]
    assert (cut["finish_reason"], cut["stop_reason"]) == ("stop", stop)


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_tokens_of_a_stop_string_are_listed_though_it_is_cut_off(
    client: httpx.Client, chat: bool, include: bool
):
    path, body = (CHAT, {"messages": TURN, "logprobs": True}) if chat else (COMPLETIONS, {})
    body = {"prompt": "x", "logprobs": 1, **body, "max_tokens": 8}
    (whole,) = flat(client.post(path, json=body).json(), chat)
    stop = whole["text"][3:5]
    body |= {"stop": stop, "include_stop_str_in_output": include}
    answer = client.post(path, json=body).json()
    (cut,) = flat(answer, chat)
    assert gathered(events(client, path, body), 1, chat) == [cut]
    assert cut["text"] == whole["text"][: 5 if include else 3]
    assert cut["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 5
    if chat:
        assert cut["logprobs"]["content"] == whole["logprobs"]["content"][:5]
        data = [bytes(entry["bytes"]).decode() for entry in cut["logprobs"]["content"]]
        assert "".join(data) == whole["text"][:5]
    else:
        assert "".join(cut["logprobs"]["tokens"]) == whole["text"][:5]
        assert cut["logprobs"]["text_offset"] == [0, 1, 2, 3, 4 if include else 3]


def test_choices_of_a_seed_differ_and_repeat(client: httpx.Client):
    body = {"prompt": "x", "max_tokens": 8, "n": 3, "seed": 5}
    first, again = (client.post(COMPLETIONS, json=body).json() for _ in range(2))
    texts = [choice["text"] for choice in first["choices"]]
    assert texts == [choice["text"] for choice in again["choices"]]
    assert len(set(texts)) == 3
    assert first["id"] != again["id"]


def test_logprobs_of_completions(client: httpx.Client):
    body = {"prompt": "x", "max_tokens": 3, "logprobs": 3}
    choice = client.post(COMPLETIONS, json=body).json()["choices"][0]
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert logprobs["text_offset"] == [0, 1, 2]
    assert logprobs["token_logprobs"] == [-1.0] * 3
    first = logprobs["top_logprobs"][0]
    assert len(first) == 3
    assert first[logprobs["tokens"][0]] == -1.0
    assert min(first.values()) == -9999.0  # JSON has no minus infinity


def test_logprobs_of_zero_are_those_of_the_chosen_tokens(client: httpx.Client):
    body = {"prompt": "x", "max_tokens": 2, "logprobs": 0}
    logprobs = client.post(COMPLETIONS, json=body).json()["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"] == [{token: -1.0} for token in logprobs["tokens"]]


@pytest.mark.parametrize("prompt", ["the wall", [5, 9, 30, 77]])
@pytest.mark.parametrize("max_tokens", [0, 1, 4])
@pytest.mark.parametrize("stream", [False, True])
def test_echo(client: httpx.Client, prompt: str | list[int], max_tokens: int, stream: bool):
    """The prompt and its log-probabilities stand before what was generated."""
    asked = {"prompt": prompt, "max_tokens": max(max_tokens, 1), "logprobs": 2}
    plain = client.post(COMPLETIONS, json=asked).json()["choices"][0]
    body = {**asked, "max_tokens": max_tokens, "echo": True}
    if stream:
        (choice,) = gathered(events(client, COMPLETIONS, body), 1, chat=False)
        logprobs = choice["logprobs"]
    else:
        answer = client.post(COMPLETIONS, json=body).json()
        assert answer["usage"]["completion_tokens"] == max_tokens
        (choice,) = answer["choices"]
        logprobs = choice["logprobs"]
    ids = prompt
    if isinstance(prompt, str):
        ids = client.post("/tokenize", json={"prompt": prompt}).json()["tokens"]
    text = client.post("/detokenize", json={"tokens": ids}).json()["prompt"]
    generated = plain["logprobs"]["tokens"] if max_tokens else []
    assert choice["text"] == text + "".join(generated)
    assert choice["finish_reason"] == "length"
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert logprobs["tokens"][len(ids) :] == generated
    assert logprobs["token_logprobs"] == [None] + [-1.0] * (len(ids) - 1 + max_tokens)
    assert logprobs["top_logprobs"][0] is None
    assert all(len(top) == 2 for top in logprobs["top_logprobs"][1:])
    starts = [sum(map(len, logprobs["tokens"][:i])) for i in range(len(logprobs["tokens"]))]
    assert logprobs["text_offset"] == starts


def test_echo_without_logprobs_and_several_choices(client: httpx.Client):
    body = {"prompt": ["one", "two"], "n": 2, "max_tokens": 3, "echo": True}
    answer = client.post(COMPLETIONS, json=body).json()
    plain = client.post(COMPLETIONS, json={**body, "echo": False}).json()
    for place, (choice, without) in enumerate(
        zip(answer["choices"], plain["choices"], strict=True)
    ):
        assert choice["text"] == ("one", "two")[place // 2] + without["text"]
        assert choice["logprobs"] is None
    assert answer["usage"] == plain["usage"]


@pytest.mark.parametrize("chat", [False, True])
def test_prompt_logprobs(client: httpx.Client, chat: bool):
    path, prompt = (CHAT, {"messages": TURN}) if chat else (COMPLETIONS, {"prompt": [5, 6, 7]})
    answer = client.post(path, json={**prompt, "max_tokens": 2, "prompt_logprobs": 3}).json()
    places = (answer if chat else answer["choices"][0])["prompt_logprobs"]
    assert len(places) == answer["usage"]["prompt_tokens"]
    assert places[0] is None
    if not chat:
        assert places[1]["6"] == {"logprob": -1.0, "rank": 2, "decoded_token": "$"}
        assert min(entry["logprob"] for entry in places[1].values()) == -9999.0
    bare = client.post(path, json={**prompt, "max_tokens": 2}).json()
    assert "prompt_logprobs" not in (bare if chat else bare["choices"][0])


def test_logprobs_of_chats(client: httpx.Client):
    body = {"messages": TURN, "max_tokens": 2, "logprobs": True, "top_logprobs": 3}
    entries = client.post(CHAT, json=body).json()["choices"][0]["logprobs"]["content"]
    assert len(entries) == 2
    for entry in entries:
        assert entry["bytes"] == list(entry["token"].encode())
        assert [top["logprob"] for top in entry["top_logprobs"]] == [-0.5, -1.0, -9999.0]
        assert entry["top_logprobs"][1]["token"] == entry["token"]


def test_a_chat_is_what_its_template_writes(client: httpx.Client):
    parts = [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}]
    plain = {"messages": [{"role": "user", "content": "he\nllo"}], "max_tokens": 4}
    whole = client.post(CHAT, json=plain).json()
    split = client.post(CHAT, json={**plain, "messages": [{"role": "user", "content": parts}]})
    assert split.json()["choices"] == whole["choices"]
    ids = client.post("/tokenize", json={"messages": plain["messages"]}).json()
    assert whole["usage"]["prompt_tokens"] == ids["count"]
    text = client.post("/detokenize", json={"tokens": ids["tokens"]}).json()["prompt"]
    assert "user\nhe\nllo" in text
    raw = client.post(COMPLETIONS, json={"prompt": ids["tokens"], "max_tokens": 4}).json()
    assert raw["choices"][0]["text"] == whole["choices"][0]["message"]["content"]


def test_max_completion_tokens_goes_first(client: httpx.Client):
    body = {"messages": TURN, "max_tokens": 9, "max_completion_tokens": 2}
    assert client.post(CHAT, json=body).json()["usage"]["completion_tokens"] == 2


def test_tokenize_and_detokenize_are_inverse(client: httpx.Client):
    answer = client.post("/tokenize", json={"prompt": "the wall", "return_token_strs": True})
    tokens = answer.json()
    assert tokens["count"] == len(tokens["tokens"]) > 0
    assert "".join(tokens["token_strs"]) == "the wall"
    assert tokens["max_model_len"] == 512
    back = client.post("/detokenize", json={"tokens": tokens["tokens"]})
    assert back.json() == {"prompt": "the wall"}
    special = {"tokens": [1, *tokens["tokens"], 2]}
    with_names = client.post("/detokenize", json=special).json()["prompt"]
    assert with_names == "<|im_start|>the wall<|im_end|>"
    back = client.post("/detokenize", json={**special, "skip_special_tokens": True})
    assert back.json() == {"prompt": "the wall"}
    assert client.post("/detokenize", json={"tokens": [384]}).status_code == 400
    assert client.post("/detokenize", json={"tokens": [-1]}).status_code == 400
    assert client.post("/tokenize", json={}).status_code == 400


def test_models_and_version(client: httpx.Client):
    (card,) = client.get("/v1/models").json()["data"]
    assert (card["id"], card["object"], card["max_model_len"]) == ("scripted", "model", 512)
    assert client.get("/version").json()["version"]
    assert "/v1/completions" in client.get("/openapi.json").json()["paths"]


@pytest.mark.parametrize("path", ["/", "/docs", "/health", "/ping", "/ready", "/v1/models"])
def test_head_is_get_without_a_body(client: httpx.Client, path: str):
    response = client.head(path)
    assert response.status_code == 200
    assert response.content == b""
    assert response.headers["content-type"] == client.get(path).headers["content-type"]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_the_first_token_comes_by_itself(checkpoint: Path, path: str):
    """Also where the second one is there before the first is sent."""
    quick = ScriptedEngine(checkpoint, step_seconds=0.0)
    body = {"prompt": "x", "messages": TURN, "max_tokens": 300, "n": 3, "return_token_ids": True}
    with running(lambda: quick) as server:
        counts: dict[int, list[int]] = {}
        for chunk in events(server.client, path, body):
            for choice in chunk["choices"]:
                if "token_ids" in choice:
                    counts.setdefault(choice["index"], []).append(len(choice["token_ids"]))
    assert [each[0] for each in counts.values()] == [1, 1, 1]
    assert [sum(each) for each in counts.values()] == [300, 300, 300]


def test_more_than_the_context_holds_is_refused(client: httpx.Client):
    """As in vLLM; without a number, the output may fill the context."""
    prompt = [5] * 500
    for number in (12, None):
        body = {"prompt": prompt, "max_tokens": number}
        assert client.post(COMPLETIONS, json=body).json()["usage"]["completion_tokens"] == 12
    response = client.post(COMPLETIONS, json={"prompt": prompt, "max_tokens": 13})
    assert response.status_code == 400
    assert "set max_tokens to at most 12" in response.json()["error"]["message"]
    assert client.post(COMPLETIONS, json={"prompt": prompt}).status_code == 400, "16 by default"
