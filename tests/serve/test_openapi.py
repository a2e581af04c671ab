"""The OpenAPI description: it is complete, and whatever is made from it is answered well."""

import os
import subprocess
import sys
from pathlib import Path

import httpx

from tests.serve.live import ROOT, eventually, running
from tests.serve.scripted import ScriptedEngine

CASES = 4
"""Drawn for each of the operations, beside those at the limits of every field."""


def test_every_operation_describes_what_it_takes_and_its_errors(client: httpx.Client):
    description = client.get("/openapi.json").json()
    operations = [
        (path, method, operation)
        for path, methods in description["paths"].items()
        for method, operation in methods.items()
    ]
    assert {path for path, method, _ in operations if method == "post"} == {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/prefixes",
        "/tokenize",
        "/detokenize",
    }
    for path, method, operation in operations:
        if path != "/metrics":  # which is text
            assert "$ref" in operation["responses"]["4XX"]["content"]["application/json"]["schema"]
        assert "422" not in operation["responses"]  # FastAPI's own, in another shape
        if method == "post":
            assert "$ref" in operation["requestBody"]["content"]["application/json"]["schema"]


def test_what_is_drawn_from_the_description_breaks_nothing(checkpoint: Path, tmp_path: Path):
    """Valid and invalid data, other methods, missing fields.

    That valid data is taken is not asked for, as a schema does not say which tokens there are.
    """
    quick = ScriptedEngine(checkpoint, step_seconds=0.0)
    with running(lambda: quick) as server:
        fuzz(server.url, tmp_path)
        assert server.client.get("/health").status_code == 200
        eventually(lambda: not quick.requests)


def fuzz(url: str, folder: Path) -> None:
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json"]
    command += ["--phases=coverage,fuzzing", f"--max-examples={CASES}", "--seed=1", "--no-color"]
    command += ["--exclude-checks=positive_data_acceptance", "--generation-database=none"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "Fuzzing" in done.stdout
