"""The wheel, installed where there is no source tree."""

import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.serve.live import PATIENCE_S, ROOT, Process

START_S = 300.0


@pytest.mark.long
def test_the_wheel_serves_from_an_empty_folder(tiny_checkpoint: Path, tmp_path: Path):
    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    run(sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path / "dist"), str(ROOT))
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    uv = [sys.executable, "-m", "uv"]
    run(*uv, "venv", "--python", sys.executable, str(tmp_path / "venv"))
    programs = tmp_path / "venv" / "bin"
    run(*uv, "pip", "install", "--python", str(programs / "python"), str(wheel))
    where = "import fairkv_jax; print(fairkv_jax.__file__)"
    assert run(str(programs / "python"), "-c", where).startswith(str(tmp_path))
    assert "usage" in run(str(programs / "fairkv"), "--help").lower()
    folder = tmp_path / "empty"
    folder.mkdir()
    arguments = [f"--model={tiny_checkpoint}", "--port=0", "--max-model-len=64"]
    with Process(
        "fairkv_jax.serve", arguments, python=str(programs / "python"), folder=folder
    ) as process:
        url = process.wait_ready(START_S)
        with httpx.Client(base_url=url, timeout=PATIENCE_S) as client:
            body = {"prompt": "x", "max_tokens": 3}
            assert client.post("/v1/completions", json=body).status_code == 200
            for path in ("/", "/docs", "/docs.js"):  # files of the package that are no modules
                assert client.get(path).status_code == 200
    assert not list(folder.iterdir())
