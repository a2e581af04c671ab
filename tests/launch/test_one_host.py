"""launch/one-host.sh and launch/fairkv.service: a server that is started again after a crash."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

from fairkv_jax.serve.flags import parse
from fairkv_jax.serve.server import THREAD_GRACE_S
from tests.launch.routers import free_port
from tests.serve.live import PATIENCE_S, ROOT, eventually

START_S = 400.0


class Script:
    """launch/one-host.sh, and what it and its servers log."""

    def __init__(self, *arguments: str):
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            ["bash", str(ROOT / "launch" / "one-host.sh"), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHON": sys.executable},
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def __enter__(self) -> "Script":
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        assert self.process.stdout is not None
        self.process.stdout.close()

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def wait_ready(self, starts: int) -> None:
        eventually(lambda: self.log.count("ready: serving on") == starts, START_S)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)


@pytest.mark.long
def test_the_script_restarts_the_server_and_passes_on_the_end(tiny_checkpoint: Path):
    port = free_port()
    flags = [f"--model={tiny_checkpoint}", f"--port={port}", "--max-model-len=256"]
    flags += ["--tensor-parallel-size=1", "--max-num-seqs=2", "--kv-budget=64"]
    with Script(*flags) as script:
        script.wait_ready(1)
        (server,) = re.findall(r"Started server process \[(\d+)\]", script.log)
        os.kill(int(server), signal.SIGKILL)
        script.wait_ready(2)
        assert "the server exited with status 137: restarting in 1 s" in script.log
        body = {"prompt": "x", "max_tokens": 200, "ignore_eos": True, "stream": True}
        url = f"http://127.0.0.1:{port}/v1/completions"
        with httpx.stream("POST", url, json=body, timeout=PATIENCE_S) as answer:
            lines = answer.iter_lines()
            next(lines)
            script.process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert script.process.wait(PATIENCE_S) == 0
        assert script.log.count("Started server process") == 2


def test_systemd_accepts_the_unit(tmp_path: Path):
    """With this interpreter and folder for those that a user puts in."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not on this machine (apt-get install systemd)")
    text = (ROOT / "launch" / "fairkv.service").read_text(encoding="utf-8")
    text = text.replace("/opt/fairkv_jax/.venv/bin/python", sys.executable)
    unit = tmp_path / "fairkv.service"
    unit.write_text(text.replace("/opt/fairkv_jax", str(ROOT)), encoding="utf-8")
    checked = subprocess.run(
        ["systemd-analyze", "verify", "--recursive-errors=no", str(unit)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr
    assert "fairkv.service" not in checked.stderr  # it only warns of keys that it does not know


def test_systemd_waits_longer_than_the_server_does():
    text = (ROOT / "launch" / "fairkv.service").read_text(encoding="utf-8")
    (patience,) = re.findall(r"TimeoutStopSec=(\d+)", text)
    (command,) = re.findall(r"ExecStart=\S+ -m fairkv_jax\.serve (.*)", text)
    assert int(patience) > parse(command.split(), {}).server.shutdown_timeout + THREAD_GRACE_S
