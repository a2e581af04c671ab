"""The oldest versions that pyproject.toml allows: a short suite passes with them."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SUITE = (
    "tests/plan/test_optimal.py",
    "tests/test_config.py",
    "tests/test_tokenizer.py",
    "tests/engine/test_structured_output.py",
    "tests/engine/test_llm.py",
    "tests/checkpoint/test_orbax.py",
    "tests/serve/test_answers.py",
    "tests/serve/test_startup.py",
)


@pytest.mark.long
def test_the_oldest_versions_of_all_requirements(tmp_path: Path):
    uv = [sys.executable, "-m", "uv"]
    python = str(tmp_path / "venv/bin/python")
    subprocess.run([*uv, "venv", "--python", sys.executable, str(tmp_path / "venv")], check=True)
    install = [*uv, "pip", "install", "--python", python, "--resolution", "lowest-direct"]
    tools = ["pytest>=8", "hypothesis>=6.100", "schemathesis>=4", "huggingface_hub>=0.30"]
    # Wheels only: the oldest versions of some packages cannot be built any more.
    install += ["--only-binary", ":all:", "--requirement", "pyproject.toml", *tools]
    subprocess.run(install, check=True, cwd=ROOT)
    suite = [python, "-m", "pytest", "-q", "-p", "no:xdist", *SUITE]
    result = subprocess.run(suite, check=False, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:]
