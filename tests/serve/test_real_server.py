"""`python -m fairkv_jax.serve` as users start it, with a tiny model and the real engine."""

import asyncio
import json
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from benchmarks.mixed_requests import is_sound, soak
from tests.serve.live import PATIENCE_S, Process, eventually, own_devices, posted

START_S = 400.0
TWO_DEVICES = "--xla_force_host_platform_device_count=2"
FLAGS = (
    "--port=0",
    "--max-model-len=128",
    "--max-num-seqs=2",
    "--kv_policy=ada_snapkv",
    "--kv-budget=40",
    "--head-plan=fair_copying",
    "--served-model-name=tiny,other",
    "--enable-prefix-caching",
)


OPTIONS = (
    {"frequency_penalty": 1.0, "presence_penalty": -0.5, "logprobs": 0},
    {"repetition_penalty": 1.3, "n": 2, "seed": 4},
    {"logit_bias": {"5": 10, "9": -100}, "temperature": 0},
    {"min_tokens": 3, "stop_token_ids": [8]},
    {"guided_regex": "[0-9]+", "top_k": 5, "seed": 3},
    {"response_format": {"type": "json_object"}, "prompt_logprobs": 2},
    {"echo": True, "logprobs": 3},
    {"echo": True, "logprobs": 1, "max_tokens": 0},
)


@pytest.fixture(scope="module")
def process(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    cache = tmp_path_factory.mktemp("compiled")
    arguments = [*FLAGS, f"--model={checkpoint}", f"--compilation-cache-dir={cache}"]
    with Process("fairkv_jax.serve", arguments, JAX_LOG_COMPILES="1", **own_devices()) as process:
        yield process


@pytest.fixture(scope="module")
def client(process: Process) -> Iterator[httpx.Client]:
    """Waits until the server is ready; it must answer 503 before."""
    url = process.address(PATIENCE_S)
    with httpx.Client(base_url=url, timeout=PATIENCE_S) as client:
        assert client.get("/ready").status_code == 503
        process.wait_ready(START_S)
        assert client.get("/ready").status_code == 200
        yield client


def test_it_logs_what_it_serves(process: Process, client: httpx.Client):
    assert "3 KV heads, float32, context of 128 tokens" in process.log
    assert "KV policy ada_snapkv: 40 tokens per head on average" in process.log
    assert "Unable to initialize backend 'tpu'" not in process.log
    # Two devices are the default where there is no GPU.
    assert "head plan fair_copying: 3 KV heads on 2 devices" in process.log
    assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["tiny", "other"]


def test_streaming_equals_not_streaming_whatever_else_runs(client: httpx.Client):
    """Greedy, and sampled with a seed; four at a time, where two run and two wait."""
    bodies = [
        {"prompt": prompt, "max_tokens": 24, "logprobs": 2, **sampling}
        for prompt in ([5, 9, 30, 77] * 20, "the wall and the inn")
        for sampling in ({"temperature": 0}, {"temperature": 1.0, "seed": 11, "top_p": 0.9})
    ]

    def ask(body: dict) -> dict:
        response = client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        return response.json()

    alone = [ask(body) for body in bodies]
    with ThreadPoolExecutor(len(bodies)) as pool:
        together = list(pool.map(ask, bodies))
    sdk = OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)
    for body, one, other in zip(bodies, alone, together, strict=True):
        assert one["choices"][0]["text"] == other["choices"][0]["text"]
        assert one["usage"] == other["usage"]
        chunks = [c.choices[0] for c in sdk.completions.create(model="tiny", stream=True, **body)]
        assert "".join(chunk.text for chunk in chunks) == one["choices"][0]["text"]
        logprobs = [chunk.logprobs for chunk in chunks if chunk.logprobs]
        tokens = [token for part in logprobs for token in part.tokens or []]
        assert tokens == one["choices"][0]["logprobs"]["tokens"]
    sdk.close()


def test_a_long_prompt_is_compressed_to_its_budget(client: httpx.Client):
    body = {"prompt": [5, 9, 30, 77] * 20, "max_tokens": 1}
    usage = client.post("/v1/completions", json=body).json()["usage"]
    assert usage["prompt_tokens"] == 80
    assert usage["kept_prompt_tokens"] == pytest.approx(40, abs=1)
    usage = client.post("/v1/completions", json={**body, "kv_budget": 36}).json()["usage"]
    assert usage["kept_prompt_tokens"] == pytest.approx(36, abs=1)
    more = client.post("/v1/completions", json={**body, "kv_budget": 41})
    assert "kv_budget 41 is beyond the 40" in more.json()["error"]["message"]


def test_chat_and_stop(client: httpx.Client):
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 30, "temperature": 0}
    full = client.post("/v1/chat/completions", json=body).json()
    text = full["choices"][0]["message"]["content"]
    assert full["usage"]["prompt_tokens"] > 10
    stop = text[3:5]
    cut = client.post("/v1/chat/completions", json={**body, "stop": stop}).json()["choices"][0]
    assert cut["message"]["content"] == text.split(stop)[0]
    assert (cut["finish_reason"], cut["stop_reason"]) == ("stop", stop)


@pytest.mark.parametrize("prompt", [[], [384], [-1], [5] * 128, "x" * 1000])
def test_bad_prompts(client: httpx.Client, prompt: list[int] | str):
    response = client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 1})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "BadRequestError"


def test_an_output_matches_its_schema(client: httpx.Client):
    """In both endpoints, beside a request that is free."""
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1, 22]}},
        "required": ["a"],
        "additionalProperties": False,
        "x-guidance": {"whitespace_flexible": False},
    }
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    turn = {"messages": [{"role": "user", "content": "hello"}], "response_format": form}
    guided = {"prompt": "the", "guided_regex": "(ab|ba){3}", "temperature": 0}
    free = {"prompt": "the wall", "max_tokens": 20, "temperature": 0}
    expected = client.post("/v1/completions", json=free).json()["choices"]
    with ThreadPoolExecutor(3) as pool:
        posts = [("chat/completions", turn), ("completions", guided), ("completions", free)]
        asked = [pool.submit(client.post, f"/v1/{path}", json=body) for path, body in posts]
    chat, regex, beside = (each.result().json()["choices"] for each in asked)
    assert json.loads(chat[0]["message"]["content"]) in ({"a": 1}, {"a": 22})
    assert chat[0]["finish_reason"] == "stop"
    assert re.fullmatch("(ab|ba){3}", regex[0]["text"])
    assert beside == expected


def test_required_and_named_tools_are_called(client: httpx.Client):
    """Streaming and not, by a model that would not call any on its own."""
    place = {"type": "object", "properties": {"at": {"enum": ["Rome", "Oslo"]}}, "required": ["at"]}
    go = {"type": "function", "function": {"name": "go", "parameters": place}}
    stay = {"type": "function", "function": {"name": "stay"}}
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hello"}],
        "tools": [go, stay],
    }
    body |= {"max_tokens": 60, "temperature": 0, "parallel_tool_calls": False}
    named = {"type": "function", "function": {"name": "go"}}
    sdk = OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)
    for choice, reason in (("required", "tool_calls"), (named, "stop")):
        fields: dict = {**body, "tool_choice": choice}
        answer = sdk.chat.completions.create(**fields).choices[0]
        assert answer.finish_reason == reason
        (call,) = answer.message.tool_calls or []
        arguments = json.loads(call.function.arguments)
        assert arguments in (
            [{"at": "Rome"}, {"at": "Oslo"}] if call.function.name == "go" else [{}]
        )
        chunks = [c.choices[0] for c in sdk.chat.completions.create(stream=True, **fields)]
        deltas = [each for c in chunks for each in c.delta.tool_calls or []]
        pieces = [each.function for each in deltas if each.function is not None]
        assert pieces[0].name == call.function.name
        assert "".join(piece.arguments or "" for piece in pieces) == call.function.arguments
        assert chunks[-1].finish_reason == reason
    sdk.close()


def test_lm_eval_reads_how_likely_a_continuation_is(client: httpx.Client):
    """Context and continuation as token ids, echoed; the sum over the continuation's places."""
    context, continuation = [5, 9, 30, 77] * 10, [40, 41, 42]
    body = {"prompt": [context + continuation], "echo": True, "logprobs": 1, "temperature": 0}

    def places(max_tokens: int) -> list[float]:
        answer = client.post("/v1/completions", json={**body, "max_tokens": max_tokens}).json()
        logprobs = answer["choices"][0]["logprobs"]
        assert logprobs["token_logprobs"][0] is None
        assert len(logprobs["token_logprobs"]) == len(context + continuation) + max_tokens
        return logprobs["token_logprobs"][len(context) : len(context) + len(continuation)]

    assert places(0) == places(1)
    for place, value in enumerate(places(1)):
        prompt = context + continuation[:place]
        near = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 0}
        near["logit_bias"] = {str(continuation[place]): 100}  # so that it is drawn
        choice = client.post("/v1/completions", json=near).json()["choices"][0]
        assert choice["logprobs"]["token_logprobs"][0] == pytest.approx(value, abs=1e-3)


def gauge(client: httpx.Client, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith(f"{name}{{")).split()[-1])


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_pages(client: httpx.Client, stream: bool):
    """Both rows are taken and given up; the next request would otherwise wait for them."""
    body = {"prompt": "the", "n": 2, "max_tokens": 120, "ignore_eos": True, "stream": stream}
    with posted(str(client.base_url).rstrip("/"), "/v1/completions", body) as connection:
        eventually(lambda: gauge(client, "vllm:num_requests_running") == 2)
        assert gauge(client, "vllm:kv_cache_usage_perc") > 0
        if stream:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
    eventually(lambda: gauge(client, "vllm:kv_cache_usage_perc") == 0, patience_s=5)
    assert gauge(client, "vllm:num_requests_running") == 0
    body = {"prompt": "the", "max_tokens": 2}
    assert client.post("/v1/completions", json=body).status_code == 200


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--head-plan=unfair"], "unfair"),
        (["--kv-budget=16"], "16"),
        (["--model=nowhere.gguf"], "nowhere.gguf"),
        (["--model=README.md"], "README.md"),
        (["--tensor-parallel-size=5"], "5"),
        (["--max-model-len=5000"], "max_model_len 5000 is beyond"),
    ],
)
def test_wrong_options_end_in_a_sentence(checkpoint: Path, flags: list[str], sentence: str):
    arguments = ["--port=0", f"--model={checkpoint}", "--compilation-cache-dir=", *flags]
    with Process("fairkv_jax.serve", arguments, XLA_FLAGS=TWO_DEVICES) as process:
        assert process.status(120) == 1
        last = [line for line in process.lines if "ERROR" in line]
        assert len(last) == 1, process.log
        assert sentence in last[0]
        assert "Traceback" not in process.log


def test_requests_of_every_kind_leave_nothing_behind(client: httpx.Client):
    """Mixed at random, a fifth of them given up: all others succeed, and all pages are free."""
    options = {"num_requests": 150, "cancelled": 0.2, "max_concurrency": 8, "output_len": 12}
    result = asyncio.run(soak(str(client.base_url).rstrip("/"), None, {**options, "seed": 0}))
    assert is_sound(result), result
    assert result["statuses"]["200"] > 80


def test_a_prefix_is_asked_twice(client: httpx.Client):
    """The answers are those of whole prompts, of which the second reads only the question."""
    document, questions = [5, 9, 30, 77] * 9, ([8, 12], [40] * 50)
    params = {"max_tokens": 8, "temperature": 0}
    prefix = client.post("/v1/prefixes", json={"prompt": document}).json()
    assert (prefix["num_tokens"], prefix["kept_tokens"]) == (36, 36)
    for question in questions:
        body = {"prompt": question, "prefix_id": prefix["id"], **params}
        answer = client.post("/v1/completions", json=body).json()
        assert answer["usage"]["prompt_tokens"] == len(document) + len(question)
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == len(document)
        if len(question) == 2:  # nothing is dropped: the whole prompt is within the budget
            body = {"prompt": [*document, *question], **params}
            whole = client.post("/v1/completions", json=body).json()
            assert whole["choices"][0]["text"] == answer["choices"][0]["text"]
    assert client.delete(f"/v1/prefixes/{prefix['id']}").status_code == 204


def test_nothing_is_compiled_once_it_is_ready(process: Process, client: httpx.Client):
    """Over all requests above, and over more shapes; the log says what JAX compiles."""
    assert client.get("/health").status_code == 200
    for length in (1, 31, 33, 64, 100, 127):
        body = {"prompt": [7] * length, "max_tokens": min(3, 128 - length), "logprobs": 5}
        body |= {"top_k": 4, "top_p": 0.7}
        assert client.post("/v1/completions", json=body).status_code == 200
    bodies = [
        {"prompt": [7] * length, "max_tokens": 5, **more} for more in OPTIONS for length in (3, 90)
    ]
    with ThreadPoolExecutor(len(bodies)) as pool:
        responses = list(pool.map(lambda body: client.post("/v1/completions", json=body), bodies))
    assert [response.status_code for response in responses] == [200] * len(bodies)
    compiled = "Finished XLA compilation"
    before, _, after = process.log.partition("ready: serving on")
    assert compiled in before
    assert compiled not in after


def test_an_object_has_the_members_that_its_schema_names(client: httpx.Client):
    """As llm and pydantic write schemas, without additionalProperties."""
    color = {"enum": ["red", "green"]}
    schema = {"type": "object", "properties": {"a": color, "b": color}, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {"name": "output", "schema": schema}}
    for seed in range(8):
        body = {"prompt": "the", "max_tokens": 80, "seed": seed, "response_format": form}
        (choice,) = client.post("/v1/completions", json=body).json()["choices"]
        assert choice["finish_reason"] == "stop"
        assert {"a"} <= set(json.loads(choice["text"])) <= {"a", "b"}
        assert " " not in choice["text"]


def test_it_shuts_down_cleanly(process: Process, client: httpx.Client):
    """The last test of this module: it ends the server."""
    process.send(signal.SIGTERM)
    assert process.status() == 0
    assert "Traceback" not in process.log
