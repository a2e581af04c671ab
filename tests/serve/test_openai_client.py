"""The official `openai` client: what it sends is taken, what it reads is there."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.serve.live import PATIENCE_S, Server, eventually, running
from tests.serve.scripted import CRASH, ScriptedEngine


@pytest.fixture(scope="module")
def sdk(server: Server) -> Iterator[OpenAI]:
    with OpenAI(
        base_url=f"{server.url}/v1", api_key="none", timeout=PATIENCE_S, max_retries=0
    ) as client:
        yield client


def test_the_model_is_listed(sdk: OpenAI):
    assert [model.id for model in sdk.models.list()] == ["scripted"]
    assert sdk.models.retrieve("scripted").id == "scripted"


def test_chat_streaming_and_not(sdk: OpenAI):
    def ask(**more):
        return sdk.chat.completions.create(
            model="scripted",
            messages=[{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}],
            max_completion_tokens=9,
            temperature=0.0,
            logprobs=True,
            top_logprobs=2,
            n=2,
            **more,
        )

    whole = ask()
    streamed, logprobs, usage = {0: "", 1: ""}, {0: [], 1: []}, None
    for chunk in ask(stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
            logprobs[choice.index] += choice.logprobs.content if choice.logprobs else []
    assert whole.object == "chat.completion"
    assert usage == whole.usage
    assert whole.usage.completion_tokens == 18
    for choice in whole.choices:
        assert choice.finish_reason == "length"
        assert choice.message.role == "assistant"
        assert len(choice.message.content) == 9
        assert streamed[choice.index] == choice.message.content
        assert logprobs[choice.index] == choice.logprobs.content
        assert len(choice.logprobs.content[0].top_logprobs) == 2


def test_completions_streaming_and_not(sdk: OpenAI):
    def ask(**more):
        return sdk.completions.create(
            model="scripted", prompt=[5, 6, 7], max_tokens=6, logprobs=1, seed=3, **more
        )

    whole = ask().choices[0]
    streamed = [chunk.choices[0] for chunk in ask(stream=True)]
    assert "".join(choice.text for choice in streamed) == whole.text
    assert streamed[-1].finish_reason == whole.finish_reason == "length"
    tokens = [token for choice in streamed for token in choice.logprobs.tokens]
    assert tokens == whole.logprobs.tokens
    assert "".join(tokens) == whole.text


def test_stop_and_extensions(sdk: OpenAI):
    def ask(**more) -> str:
        answer = sdk.completions.create(model="scripted", prompt="x", max_tokens=12, **more)
        return answer.choices[0].text

    text = ask()
    assert ask(stop=[text[4:6], "never"]) == text[:4]
    assert ask(extra_body={"top_k": 5, "min_p": 0.1, "ignore_eos": True}) == text


def test_options_and_formats_of_the_clients_own(sdk: OpenAI):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    chat = sdk.chat.completions.create(
        model="scripted",
        messages=[{"role": "user", "content": "hi"}],
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={"50": -100},
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "a", "schema": schema, "strict": True},
        },
        extra_body={"repetition_penalty": 1.1, "min_tokens": 2},
    )
    assert chat.choices[0].message.content
    echoed = sdk.completions.create(
        model="scripted", prompt=[5, 6, 7], max_tokens=0, echo=True, logprobs=1
    )
    logprobs = echoed.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs == [None, -1.0, -1.0]
    assert "".join(logprobs.tokens or ()) == echoed.choices[0].text
    with pytest.raises(openai.BadRequestError, match="unclosed") as bad:
        sdk.completions.create(model="scripted", prompt="x", extra_body={"guided_regex": "(["})
    assert bad.value.param == "guided_regex"


def test_errors_are_the_clients_exceptions(sdk: OpenAI, scripted: ScriptedEngine):
    with pytest.raises(openai.BadRequestError, match="temperature must be") as bad:
        sdk.completions.create(model="scripted", prompt="x", temperature=-1)
    assert bad.value.type == "BadRequestError"
    with pytest.raises(openai.BadRequestError) as bad:
        sdk.chat.completions.create(model="scripted", messages=[])
    assert bad.value.param == "messages"
    with pytest.raises(openai.NotFoundError):
        sdk.completions.create(model="another", prompt="x")
    with pytest.raises(openai.NotFoundError):
        sdk.models.retrieve("another")
    with running(lambda: scripted, api_keys=("key",)) as guarded:
        url = f"{guarded.url}/v1"
        with (
            OpenAI(base_url=url, api_key="wrong", max_retries=0) as stranger,
            pytest.raises(openai.AuthenticationError),
        ):
            stranger.models.list()
        with OpenAI(base_url=url, api_key="key", max_retries=0) as friend:
            assert friend.models.retrieve("scripted")


def test_an_overloaded_server_is_an_error_that_may_be_tried_again(checkpoint: Path):
    """The client tries again by itself, as long as it is told to."""
    slow = ScriptedEngine(checkpoint, max_num_seqs=1, step_seconds=0.005)
    with (
        running(lambda: slow, max_num_queued_reqs=0) as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as hasty,
    ):
        running_one = hasty.completions.create(
            model="scripted", prompt="x", max_tokens=200, stream=True
        )
        next(running_one)
        with pytest.raises(openai.InternalServerError, match="max-num-queued-reqs") as full:
            hasty.completions.create(model="scripted", prompt="x", max_tokens=1)
        assert full.value.status_code == 503
        patient = hasty.with_options(max_retries=5)
        assert patient.completions.create(model="scripted", prompt="x", max_tokens=1).choices
        assert list(running_one)[-1].choices[0].finish_reason == "length"


def test_an_engine_that_fails_in_a_stream_is_an_error_of_the_stream(checkpoint: Path):
    engine = ScriptedEngine(checkpoint, step_seconds=0.005)
    with (
        running(lambda: engine) as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        stream = client.completions.create(
            model="scripted", prompt="x", max_tokens=400, stream=True
        )
        next(stream)
        with pytest.raises(openai.InternalServerError, match="engine has failed"):
            client.completions.create(model="scripted", prompt=CRASH)
        with pytest.raises(openai.APIError, match="engine has failed"):
            list(stream)


def test_a_stream_that_is_closed_ends_its_request(sdk: OpenAI, scripted: ScriptedEngine):
    stream = sdk.completions.create(model="scripted", prompt="x", max_tokens=500, stream=True)
    next(stream)
    before = len(scripted.aborted)
    stream.close()
    eventually(lambda: len(scripted.aborted) == before + 1)


def test_many_at_a_time_from_the_asynchronous_client(server: Server):
    async def ask_all() -> list[str]:
        url = f"{server.url}/v1"
        async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            asking = (
                client.completions.create(model="scripted", prompt=[5 + i], max_tokens=9)
                for i in range(12)
            )
            return [answer.choices[0].text for answer in await asyncio.gather(*asking)]

    texts = asyncio.run(ask_all())
    assert len(set(texts)) == 12
    assert texts == asyncio.run(ask_all())
