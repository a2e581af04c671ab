"""Other clients than OpenAI's own: LangChain, LiteLLM, Instructor and llm; and lm-eval's requests.

They are in the extra `clients`, whose packages the long suite needs.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
import pytest
from openai import OpenAI
from pydantic import BaseModel, Field

from fairkv_jax.engine.build import build_engine
from tests.serve.live import PATIENCE_S, Server, eventually, running

REASON = "install the extra `clients`"
START_S = 400.0


class Answer(BaseModel):
    """Without additionalProperties, as pydantic writes schemas; short enough for a random model."""

    color: Literal["red", "green"]
    count: Annotated[int, Field(ge=0, le=9)]
    sizes: Annotated[list[Literal["s", "m"]], Field(max_length=2)] = []


@pytest.fixture(scope="module")
def real(checkpoint: Path) -> Iterator[Server]:
    """The real engine with the tiny model, which follows schemas."""
    options: dict[str, Any] = {"max_model_len": 512, "max_num_seqs": 4}
    with running(lambda: build_engine(checkpoint, progress=False, **options), wait=False) as server:
        eventually(lambda: server.client.get("/ready").status_code == 200, START_S)
        yield server


@pytest.mark.long
def test_instructor(real: Server):
    instructor = pytest.importorskip("instructor", reason=REASON)
    with OpenAI(base_url=f"{real.url}/v1", api_key="none", max_retries=0) as sdk:
        client = instructor.from_openai(sdk, mode=instructor.Mode.JSON_SCHEMA)
        answer = client.chat.completions.create(
            model=sdk.models.list().data[0].id,
            messages=[{"role": "user", "content": "which?"}],
            response_model=Answer,
            max_tokens=200,
        )
        assert isinstance(answer, Answer)


@pytest.mark.long
def test_langchain(real: Server, server: Server):
    openai = pytest.importorskip("langchain_openai", reason=REASON)
    options: dict[str, Any] = {"api_key": "none", "max_retries": 0, "timeout": PATIENCE_S}
    chat = openai.ChatOpenAI(
        model="scripted", base_url=f"{server.url}/v1", max_tokens=8, logprobs=True, **options
    )
    whole = chat.invoke("hello")
    assert len(whole.content) == 8
    assert whole.usage_metadata["output_tokens"] == 8
    assert "".join(chunk.content for chunk in chat.stream("hello")) == whole.content
    assert len(chat.batch(["a", "b", "c"])) == 3
    text = openai.OpenAI(model="scripted", base_url=f"{server.url}/v1", max_tokens=8, **options)
    assert len(text.invoke("hello")) == 8
    model = real.client.get("/v1/models").json()["data"][0]["id"]
    strict = openai.ChatOpenAI(
        model=model, base_url=f"{real.url}/v1", max_tokens=200, **options
    ).with_structured_output(Answer, method="json_schema")
    assert isinstance(strict.invoke("which?"), Answer)


@pytest.mark.long
def test_litellm(server: Server):
    litellm = pytest.importorskip("litellm", reason=REASON)
    options: dict[str, Any] = {"api_base": f"{server.url}/v1", "api_key": "none", "max_retries": 0}
    messages = [{"role": "user", "content": "hello"}]
    for provider in ("openai", "hosted_vllm"):
        name = f"{provider}/scripted"
        whole = litellm.completion(name, messages=messages, max_tokens=8, **options)
        text = whole.choices[0].message.content
        assert len(text) == 8
        chunks = litellm.completion(name, messages=messages, max_tokens=8, stream=True, **options)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    with pytest.raises(litellm.BadRequestError, match="is not supported by this server"):
        litellm.embedding("openai/scripted", input=["x"], **options)
    with pytest.raises(litellm.BadRequestError, match="is not supported by this server"):
        litellm.responses(model="openai/scripted", input="x", **options)


@pytest.mark.long
def test_a_litellm_router_keeps_the_deployment_after_a_refusal(server: Server):
    litellm = pytest.importorskip("litellm", reason=REASON)
    deployment = {
        "model": "openai/scripted",
        "api_base": f"{server.url}/v1",
        "api_key": "none",
        "max_retries": 0,
    }
    router = litellm.Router(
        model_list=[{"model_name": "m", "litellm_params": deployment}],
        num_retries=0,
        allowed_fails=0,
    )
    with pytest.raises(litellm.BadRequestError):
        router.embedding("m", input=["x"])
    messages = [{"role": "user", "content": "hello"}]
    assert router.completion("m", messages=messages, max_tokens=4).choices[0].message.content


@pytest.mark.long
def test_llm(real: Server, tmp_path: Path):
    """The command line, with a schema in the short form that it knows."""
    pytest.importorskip("llm", reason=REASON)
    model = real.client.get("/v1/models").json()["data"][0]["id"]
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: here\n  model_name: {model}\n  api_base: {real.url}/v1\n"
        "  supports_schema: true\n",
        encoding="utf-8",
    )
    schema = '{"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}'
    arguments = ["-m", "here", "--key", "none", "--no-log", "-o", "max_tokens", "60"]
    done = subprocess.run(
        [sys.executable, "-m", "llm", "which?", *arguments, "--schema", schema],
        env={"LLM_USER_PATH": str(tmp_path), "PATH": "", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ('{"ok":true}', '{"ok":false}')


def test_what_lm_eval_reads(client: httpx.Client):
    """The requests of `local-completions`, and how it finds a continuation's probability."""
    prompt = client.post("/tokenize", json={"prompt": "the wall and 漢"}).json()["tokens"]
    context = len(prompt) - 3
    body = {
        "model": "scripted",
        "prompt": [prompt],
        "temperature": 0,
        "max_tokens": 1,
        "seed": 1234,
    }
    body |= {"seed": 1234, "logprobs": 1, "echo": True}
    (choice,) = client.post("/v1/completions", json=body).json()["choices"]
    logprobs = choice["logprobs"]
    continuation = slice(context, -1)
    assert len(logprobs["tokens"]) == len(prompt) + 1
    assert logprobs["token_logprobs"][continuation] == [-1.0] * 3
    for name, top in zip(
        logprobs["tokens"][continuation], logprobs["top_logprobs"][continuation], strict=True
    ):
        assert name in top
        assert max(top, key=top.__getitem__) != name, "the scripted token is the second likeliest"
    generate = {"model": "scripted", "prompt": ["the wall"], "max_tokens": 6, "stop": ["\n\n"]}
    answer = client.post("/v1/completions", json={**generate, "temperature": 0, "seed": 1234})
    assert len(answer.json()["choices"][0]["text"]) == 6
