"""What stands around every request: its id, the log, other origins, TLS."""

import json
import logging
import ssl
import subprocess
from pathlib import Path

import httpx
import pytest

from fairkv_jax.serve import access
from tests.serve.live import PATIENCE_S, Process, Server, eventually, running
from tests.serve.scripted import ScriptedEngine

COMPLETIONS = "/v1/completions"
SECRET = {"prompt": "my secret" * 20, "max_tokens": 5, "n": 2}


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, access.log.name)
    return caplog


def last_record(lines: pytest.LogCaptureFixture, path: str) -> dict:
    """The log's line about a path, which is written after its answer."""

    def records() -> list[dict]:
        messages = [r.getMessage() for r in lines.records if r.name == access.log.name]
        return [record for m in messages if (record := json.loads(m))["path"] == path]

    eventually(records)
    return records()[-1]


def test_a_request_is_one_line_of_json(client: httpx.Client, lines: pytest.LogCaptureFixture):
    headers = {"X-Request-Id": "trace-17"}
    usage = client.post(COMPLETIONS, json=SECRET, headers=headers).json()["usage"]
    record = last_record(lines, COMPLETIONS)
    assert record["request_id"] == "trace-17"
    assert (record["method"], record["status"], record["client"]) == ("POST", 200, "127.0.0.1")
    assert record["prompt_tokens"] == usage["prompt_tokens"]
    assert record["completion_tokens"] == usage["completion_tokens"] == 10
    kept = usage["kept_prompt_tokens"] / usage["prompt_tokens"]
    assert record["kept_fraction"] == pytest.approx(kept, abs=1e-3)
    assert kept < 1
    assert record["finish_reasons"] == ["length", "length"]
    assert 0 <= record["queue_seconds"] <= record["first_token_seconds"] <= record["seconds"]
    assert "secret" not in lines.text


def test_an_abandoned_stream_is_logged_with_what_it_got(
    client: httpx.Client, lines: pytest.LogCaptureFixture
):
    body = {"prompt": "x", "max_tokens": 400, "stream": True}
    with client.stream("POST", COMPLETIONS, json=body) as response:
        next(response.iter_lines())
    record = last_record(lines, COMPLETIONS)
    assert record["finish_reasons"] == ["abort"]
    assert 0 < record["completion_tokens"] < 400


def test_probes_are_not_logged_unless_they_fail(
    client: httpx.Client, lines: pytest.LogCaptureFixture
):
    for path in ("/health", "/ready", "/metrics"):
        assert client.get(path).status_code == 200
    assert client.get("/nowhere").status_code == 404
    assert last_record(lines, "/nowhere")["status"] == 404
    assert "/health" not in lines.text


def test_prompts_are_logged_where_asked_for(
    scripted: ScriptedEngine, lines: pytest.LogCaptureFixture
):
    with running(lambda: scripted, enable_log_requests=True) as server:
        server.client.post(COMPLETIONS, json={**SECRET, "prompt": ["my secret", "other"]})
        assert last_record(lines, COMPLETIONS)["prompts"] == ["my secret", "other"]
        server.client.post(COMPLETIONS, json={"prompt": [5, 6], "max_tokens": 1})
        eventually(lambda: last_record(lines, COMPLETIONS)["prompts"] == [[5, 6]])


@pytest.mark.parametrize("given", [None, "", "two words", "x" * 129, '"},{"', "é".encode()])
def test_an_id_is_made_where_the_given_one_is_none(client: httpx.Client, given: str | None):
    headers = {} if given is None else {"X-Request-Id": given}
    ids = {client.get("/version", headers=headers).headers["X-Request-Id"] for _ in range(2)}
    assert len(ids) == 2
    assert given not in ids


def test_errors_have_an_id_too(client: httpx.Client):
    headers = {"X-Request-Id": "a"}
    response = client.post(COMPLETIONS, json={"prompt": ""}, headers=headers)
    assert (response.status_code, response.headers["X-Request-Id"]) == (400, "a")


def test_other_origins_are_let_in_one_by_one(scripted: ScriptedEngine, client: httpx.Client):
    preflight = {
        "Origin": "https://chat.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    allowed = "Access-Control-Allow-Origin"
    assert allowed not in client.get("/version", headers=preflight).headers  # none by default
    origins = ("https://chat.example",)
    with running(lambda: scripted, allowed_origins=origins, api_keys=("key",)) as server:
        asked = server.client.options(COMPLETIONS, headers=preflight)
        assert asked.status_code == 200  # a browser sends no key when it asks
        assert asked.headers[allowed] == "https://chat.example"
        # An error without the header would not be readable.
        refused = server.client.post(COMPLETIONS, json=SECRET, headers=preflight)
        assert (refused.status_code, refused.headers[allowed]) == (401, "https://chat.example")
        stranger = {**preflight, "Origin": "https://evil.example"}
        assert server.client.options(COMPLETIONS, headers=stranger).status_code == 400
        assert allowed not in server.client.get("/version", headers=stranger).headers


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A key and a certificate for 127.0.0.1 that it signs itself."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    command += ["-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1"]
    command += ["-keyout", str(key), "-out", str(certificate)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not on this machine, and makes the certificate")
    return key, certificate


def test_https(checkpoint: Path, certificate: tuple[Path, Path]):
    key, public = map(str, certificate)
    arguments = [str(checkpoint), "0.001", f"--ssl-keyfile={key}", f"--ssl-certfile={public}"]
    with Process("tests.serve.scripted_server", arguments) as process:
        url = process.wait_ready(PATIENCE_S)
        assert url.startswith("https://")
        trusting = ssl.create_default_context(cafile=public)
        with httpx.Client(base_url=url, verify=trusting, timeout=PATIENCE_S) as client:
            assert client.post(COMPLETIONS, json=SECRET).status_code == 200
        with pytest.raises(httpx.TransportError):
            httpx.get(url.replace("https", "http") + "/health", timeout=PATIENCE_S)


def test_a_certificate_that_is_none_is_a_sentence(certificate: tuple[Path, Path]):
    key, _ = certificate
    arguments = ["--port=0", f"--ssl-keyfile={key}", "--ssl-certfile=README.md"]
    with Process("fairkv_jax.serve", arguments) as process:
        assert process.status() == 1
    assert "cannot read the certificate README.md" in process.log
    assert "Traceback" not in process.log


def test_the_tokenizer_describes_itself(server: Server, scripted: ScriptedEngine):
    info = server.client.get("/tokenizer_info").json()
    assert info["vocab_size"] == scripted.model_config.vocab_size
    assert info["model_max_length"] == 512
    assert info["eos_token_ids"] == sorted(scripted.tokenizer.eos_token_ids)
    assert "<|im_start|>" in info["chat_template"]
