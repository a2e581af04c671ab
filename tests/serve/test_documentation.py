"""The Python examples of the documentation run against a server, as they stand there."""

import re
from pathlib import Path

import pytest

from tests.serve.live import ROOT, running
from tests.serve.scripted import ScriptedEngine

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


def run_example(page: str, contains: str, changes: dict[str, str]) -> None:
    """Runs the page's block of Python that contains a text, with other values in some places."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    (block,) = [block for block in blocks if contains in block]
    for shown, used in changes.items():
        assert block.count(shown) == 1, f"{page} does not show {shown!r} once"
        block = block.replace(shown, used)
    exec(block, {})


def test_a_first_question(checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    engine = ScriptedEngine(checkpoint)
    engine.says = "It is warm."
    with running(lambda: engine) as server:
        changes = {"http://127.0.0.1:8000": server.url, "SmolLM2-135M-Instruct": "scripted"}
        run_example("getting-started.md", "OpenAI(", changes)
    assert capsys.readouterr().out == "It is warm."


def test_a_call_of_a_tool(checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    engine = ScriptedEngine(checkpoint, max_model_len=4096)
    engine.says = CALL
    options = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes"}
    with running(lambda: engine, **options) as server:
        changes = {"http://localhost:8000": server.url}
        run_example("how-to/call-tools.md", "get_weather", changes)
    assert capsys.readouterr().out == 'get_weather {"city": "Paris"}\n'


def test_a_document_that_is_asked_twice(checkpoint: Path):
    """The tiny model has no head scores, which duo_attention needs."""
    changes = {
        "LLM(": f"LLM({str(checkpoint)!r}, max_model_len=128, progress=False, ",
        '"duo_attention"': '"keydiff"',
    }
    run_example("getting-started.md", "cache_prefix", changes)
