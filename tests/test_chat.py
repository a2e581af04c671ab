"""The terminal's client, against a server whose answers follow from what it is sent."""

import signal
import subprocess
import sys
from collections.abc import Iterator

import httpx
import pytest

from fairkv_jax.chat import Talk
from tests.oracle.tiny import write_tiny_checkpoint
from tests.serve.live import ROOT, Server, eventually, running
from tests.serve.scripted import ScriptedEngine


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> ScriptedEngine:
    checkpoint = write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny.gguf")
    return ScriptedEngine(checkpoint, step_seconds=0.005)


@pytest.fixture(scope="module")
def server(engine: ScriptedEngine) -> Iterator[Server]:
    with running(lambda: engine, api_keys=("key",)) as server:
        yield server


def said(server: Server, messages: list[dict[str, str]], max_tokens: int) -> str:
    body = {"messages": messages, "max_tokens": max_tokens}
    headers = {"Authorization": "Bearer key"}
    answer = server.client.post("/v1/chat/completions", json=body, headers=headers).json()
    return answer["choices"][0]["message"]["content"]


def test_answers_are_streamed_and_remembered(server: Server):
    talk = Talk(server.url, {"max_tokens": 8}, system="be brief", api_key="key")
    pieces = list(talk.ask("hello"))
    assert len(pieces) > 2
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    assert "".join(pieces) == said(server, turns, 8)
    turns += [
        {"role": "assistant", "content": "".join(pieces)},
        {"role": "user", "content": "more"},
    ]
    assert "".join(talk.ask("more")) == said(server, turns, 8)
    talk.reset()
    assert talk.messages == turns[:1]


def test_a_stopped_answer_is_remembered_as_far_as_it_came(server: Server, engine: ScriptedEngine):
    talk = Talk(server.url, {"max_tokens": 400}, api_key="key")
    pieces = talk.ask("hello")
    heard = next(piece for piece in pieces if piece)
    pieces.close()
    assert talk.messages[-1] == {"role": "assistant", "content": heard}
    eventually(lambda: not engine.requests)
    assert engine.aborted


@pytest.mark.parametrize(
    ("options", "key", "sentence"),
    [
        ({}, "wrong", "API key is missing"),
        ({"temperature": -1}, "key", "temperature must be"),
    ],
)
def test_a_refusal_is_the_servers_sentence(server: Server, options: dict, key: str, sentence: str):
    talk = Talk(server.url, options, api_key=key)
    with pytest.raises(ValueError, match=sentence):
        list(talk.ask("hello"))
    assert talk.messages == []


def start(server: Server, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fairkv_jax.chat", f"--base-url={server.url}/v1"]
    return subprocess.Popen(
        [*command, "--api-key=key", *arguments],
        text=True,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def test_the_program(server: Server):
    with start(server, "--max-tokens=6") as process:
        out, _ = process.communicate(
            "hello\n/what\n/reset\nhello\n/quit\nnever asked\n", timeout=60
        )
    answer = said(server, [{"role": "user", "content": "hello"}], 6)
    first, helped, again = out.splitlines()
    assert first == again == answer
    assert "/reset" in helped
    assert process.returncode == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(server: Server, engine: ScriptedEngine):
    with start(server, "--max-tokens=400") as process:
        assert process.stdin is not None
        process.stdin.write("hello\n")
        process.stdin.flush()
        eventually(lambda: any(len(tokens) > 3 for tokens in running_tokens(engine)))
        process.send_signal(signal.SIGINT)
        eventually(lambda: not engine.requests)
        out, _ = process.communicate("/what\n", timeout=60)
    assert "[stopped]" in out
    assert "/reset" in out
    assert process.returncode == 0


def running_tokens(engine: ScriptedEngine) -> list[list[int]]:
    return [engine.generated[request_id] for request_id in list(engine.requests)]


def test_a_server_that_is_not_there_is_a_sentence(server: Server):
    port = httpx.URL(server.url).port
    talk = Talk(f"http://127.0.0.1:{port}/nothing/", api_key="key")
    with pytest.raises(ValueError, match="Not Found"):
        list(talk.ask("hello"))
    with pytest.raises(OSError, match="refused"):
        list(Talk("127.0.0.1:1").ask("hello"))
