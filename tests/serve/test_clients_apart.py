"""Clients that do not go with the development extra: each has an environment of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve.live import Process, running
from tests.serve.scripted import ScriptedEngine

pytestmark = pytest.mark.long

INSTALL_S = 600.0
ROME = '{"city":"Rome"}'
ANSWERS = {
    "TOOLS": ROME,
    "TOOLS_STRICT": ROME,
    "PARALLEL_TOOLS": '<tool_call>\n{"name": "City", "arguments": {"city": "Rome"}}\n</tool_call>',
    "JSON": ROME,
    "MD_JSON": f"```json\n{ROME}\n```",
    "JSON_SCHEMA": ROME,
}
"""What a model says to a question in each of Instructor's modes."""


def run(client: str, *arguments: str) -> str:
    """Runs a script of clients_apart/ with the packages that it names; returns what it prints."""
    script = Path(__file__).with_name("clients_apart") / f"with_{client}.py"
    uv = [sys.executable, "-m", "uv", "run", "--quiet", "--python", sys.executable]
    done = subprocess.run(
        [*uv, "--script", str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=INSTALL_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("mode", ANSWERS)
def test_instructor_gets_structures(checkpoint: Path, mode: str):
    engine = ScriptedEngine(checkpoint, max_model_len=4096)
    engine.says = ANSWERS[mode]
    options = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes"}
    with running(lambda: engine, **options) as server:
        assert run("instructor", server.url, mode) == "done\n"


def test_lm_eval_evaluates():
    """Log-likelihoods of echoed prompts, generation until a line's end, the server's tokenizer."""
    with Process("fairkv_jax.serve", ["--port=0", "--served-model-name=demo"]) as process:
        process.wait_ready(INSTALL_S)
        found = json.loads(run("lm_eval", process.address(INSTALL_S)).splitlines()[-1])
    assert found["accuracy"] == 1
    assert len(found["written"]) == 3
    assert all("\n" not in text for text in found["written"])
    assert found["written"][0].startswith(" Paris")
