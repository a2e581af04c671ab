"""Other clients of OpenAI's API: LangChain, LiteLLM and llm; what they send is taken and read."""

import asyncio
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, SecretStr

from tests.serve.live import PATIENCE_S, Server, running
from tests.serve.scripted import ScriptedEngine

ROME = '{"city":"Rome"}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {ROME}}}\n</tool_call>'
REQUESTS = Path(__file__).parent / "published" / "load_generators.json"
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


class City(BaseModel):
    """Where the weather is asked for."""

    city: str


@pytest.fixture
def talker(checkpoint: Path) -> ScriptedEngine:
    return ScriptedEngine(checkpoint)


@pytest.fixture
def talking(talker: ScriptedEngine) -> Iterator[Server]:
    options = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes"}
    with running(lambda: talker, **options) as server:
        yield server


def langchain(server: Server, **options) -> ChatOpenAI:
    return ChatOpenAI(
        model="scripted",
        base_url=f"{server.url}/v1",
        api_key=SecretStr("none"),
        timeout=PATIENCE_S,
        max_retries=0,
        max_completion_tokens=100,
        **options,
    )


def test_langchain_chats_streams_and_counts(server: Server):
    model = langchain(server, stream_usage=True, temperature=0).bind(max_completion_tokens=9)
    whole = model.invoke([HumanMessage("hi")])
    parts = list(model.stream([HumanMessage("hi")]))
    assert len(whole.text) == 9
    assert "".join(part.text for part in parts) == whole.text
    assert len(parts) > 3
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] == 9
    assert [part.usage_metadata for part in parts if part.usage_metadata] == [whole.usage_metadata]


def test_langchain_completes(server: Server):
    model = OpenAI(
        model="scripted",
        base_url=f"{server.url}/v1",
        api_key=SecretStr("none"),
        max_tokens=6,
        max_retries=0,
    )
    assert len(model.invoke("x")) == 6
    assert len(model.batch(["x", "y"])) == 2


def test_langchain_calls_tools_and_gets_structures(talker: ScriptedEngine, talking: Server):
    talker.says = CALL
    answer = langchain(talking).bind_tools([TOOL]).invoke("Is it warm in Rome?")
    (call,) = answer.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Rome"})
    talker.says = ROME
    for method in ("json_schema", "function_calling"):
        structured = langchain(talking).with_structured_output(City, method=method)
        assert structured.invoke("Where?") == City(city="Rome")


@pytest.fixture
def litellm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imported late, for it takes long, and with the thread's event loop, which it does not close.

    Its types leave out the exceptions, and name streams and answers alike.
    """
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield importlib.import_module("litellm")
    asyncio.set_event_loop(None)
    loop.close()


@pytest.mark.filterwarnings("default")
def test_litellm_chats_streams_and_calls_tools(
    litellm: Any, talker: ScriptedEngine, talking: Server
):
    def ask(**options):
        return litellm.completion(
            model="openai/scripted",
            messages=[{"role": "user", "content": "hi"}],
            api_base=f"{talking.url}/v1",
            api_key="none",
            timeout=PATIENCE_S,
            num_retries=0,
            **options,
        )

    talker.says = CALL
    (call,) = ask(tools=[TOOL], tool_choice="auto").choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == (
        "get_weather",
        {"city": "Rome"},
    )
    talker.says = "It is warm."
    assert ask().choices[0].message.content == "It is warm."
    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    said = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(said) == "It is warm."
    marked = [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]
    answer = litellm.completion(
        model="openai/scripted",
        messages=[{"role": "user", "content": marked}],
        api_base=f"{talking.url}/v1",
        api_key="none",
        num_retries=0,
    )
    assert answer.choices[0].message.content == "It is warm."


@pytest.mark.filterwarnings("default")
def test_litellm_learns_what_is_not_served(litellm: Any, server: Server):
    """As the client's mistake: a 404 would make its proxy take the deployment out."""
    with pytest.raises(litellm.BadRequestError, match="embeddings"):
        litellm.embedding(
            model="openai/scripted",
            input=["hi"],
            api_base=f"{server.url}/v1",
            api_key="none",
            num_retries=0,
        )


def test_llm_prompts_and_takes_schemas(talker: ScriptedEngine, talking: Server, tmp_path: Path):
    """The command line of `llm`, with a model of extra-openai-models.yaml."""
    (tmp_path / "extra-openai-models.yaml").write_text(
        "- model_id: ours\n  model_name: scripted\n"
        f"  api_base: {talking.url}/v1\n  supports_schema: true\n"
    )

    def llm(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "llm", "prompt", "-m", "ours", "--key", "none", *arguments],
            env=os.environ | {"LLM_USER_PATH": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    talker.says = "It is warm."
    assert llm("Is it warm?") == "It is warm."
    assert llm("Is it warm?", "--no-stream", "-s", "be brief") == "It is warm."
    talker.says = ROME
    assert json.loads(llm("Where?", "--schema", "city str")) == {"city": "Rome"}


def recorded(generator: str) -> list[dict[str, Any]]:
    return json.loads(REQUESTS.read_text())[generator]


@pytest.mark.parametrize(
    "generator", [name for name in json.loads(REQUESTS.read_text()) if name != "about"]
)
def test_load_generators_get_what_they_count(talking: Server, generator: str):
    """Their requests as they send them; tokens are counted by the usage in the stream."""
    for each in recorded(generator):
        body = each.get("body")
        content = None if body is None else json.dumps(body)
        answer = talking.client.request(
            each["method"], each["path"], headers=each["headers"], content=content
        )
        assert answer.status_code == 200, answer.text
        if body is None:
            continue
        lines = [line for line in answer.text.splitlines() if line]
        assert lines.pop() == "data: [DONE]"
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
        assert chunks[-1]["usage"]["completion_tokens"] == 8
        if body["stream_options"].get("continuous_usage_stats"):
            counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
            assert counts == sorted(counts)
