"""Fetching from the Hub: its own client against a server that speaks its protocol."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from fairkv_jax.checkpoint import CheckpointError, open_checkpoint
from fairkv_jax.checkpoint.__main__ import main
from fairkv_jax.checkpoint.hub import fetch_hub, is_hub_name
from tests.oracle.tiny import write_tiny_checkpoint
from tests.oracle.tiny_hf import write_tiny_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "someone/Tiny-1"


class Hub(BaseHTTPRequestHandler):
    """Serves one repository: its list of files, and each file with its hash."""

    folder: Path

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        if path.startswith(f"/api/models/{NAME}/revision/"):
            files = [{"rfilename": file.name} for file in self.folder.iterdir()]
            listing = {"id": NAME, "sha": COMMIT, "siblings": files, "private": False}
            self._send(json.dumps(listing | {"downloads": 0, "tags": []}).encode(), with_body)
        elif path.startswith(f"/api/models/{NAME}/tree/"):
            files = [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40}
                for f in self.folder.iterdir()
            ]
            self._send(json.dumps(files).encode(), with_body)
        elif path.startswith(f"/{NAME}/resolve/"):
            self._send((self.folder / path.rsplit("/", 1)[-1]).read_bytes(), with_body)
        else:
            self.send_error(404)

    def _send(self, content: bytes, with_body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def published(tmp_path) -> Path:
    gguf = write_tiny_checkpoint(tmp_path / "tiny.gguf")
    folder = write_tiny_folder(tmp_path / "published", gguf, num_parts=2)
    (folder / "README.md").write_text("not needed")
    (folder / "consolidated.safetensors").write_bytes(b"the same weights again")
    return folder


@pytest.fixture
def endpoint(published) -> Iterator[str]:
    handler = type("Handler", (Hub,), {"folder": published})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def fetch(endpoint: str, name: str, root: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = ["-m", "fairkv_jax.checkpoint", "fetch", name, "--root", str(root), *flags]
    return run(endpoint, root, *command)


def run(endpoint: str, root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python process whose Hub is the endpoint."""
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(root / "home"), "HF_HUB_DISABLE_XET": "1"}
    settings |= {"no_proxy": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command, env = [sys.executable, *arguments], os.environ | settings
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_a_repository_becomes_a_folder_that_its_name_opens(endpoint, published, tmp_path):
    root = tmp_path / "checkpoints"
    result = fetch(endpoint, NAME, root)
    assert result.returncode == 0, result.stderr
    folder = root / NAME
    assert result.stdout.strip() == str(folder)
    checkpoint, expected = open_checkpoint(folder), open_checkpoint(published)
    for name in expected.names():
        np.testing.assert_array_equal(checkpoint.tensor(name), expected.tensor(name))
    checkpoint.tokenizer()
    names = {path.name for path in folder.iterdir()}
    assert not names & {"README.md", "consolidated.safetensors"}
    again = fetch("http://127.0.0.1:1", NAME, root, "--verify")  # it is there: no network
    assert again.returncode == 0
    assert "files have their recorded hashes" in again.stderr
    weights = next(folder.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    damaged = fetch("http://127.0.0.1:1", NAME, root, "--verify")
    assert damaged.returncode == 1
    assert f"error: {weights} is damaged" in damaged.stderr


def test_a_name_is_fetched_where_it_is_opened(endpoint, tmp_path):
    code = (
        "from pathlib import Path; from fairkv_jax.checkpoint import open; "
        f"open.checkpoints_root = lambda: Path({str(tmp_path)!r}); "
        f"print(open.open_checkpoint({NAME!r}).config.num_layers)"
    )
    result = run(endpoint, tmp_path, "-c", code)
    assert result.stdout.strip() == "2", result.stderr
    assert (tmp_path / NAME / "config.json").is_file()


def test_no_network_and_no_such_repository_are_one_line(endpoint, tmp_path):
    for where, name in (("http://127.0.0.1:1", NAME), (endpoint, "someone/else")):
        result = fetch(where, name, tmp_path / "checkpoints")
        assert result.returncode == 1
        assert result.stderr.splitlines()[-1].startswith(f"error: cannot fetch {name} from the Hub")
        assert not (tmp_path / "checkpoints" / name).exists()


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"pip install 'fairkv-jax\[hub\]'"):
        fetch_hub(NAME, tmp_path)


def test_an_owner_that_is_a_folder_here_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone").mkdir()
    with pytest.raises(CheckpointError, match=f"no checkpoint at {NAME}, nor in"):
        open_checkpoint(NAME)


@pytest.mark.parametrize("name", ["plain", "a/b/c", "./a", "/a", "a/", "../a", "~/a", ""])
def test_other_names_are_paths(name, capsys):
    assert not is_hub_name(name)
    assert main(["fetch", name]) == 1
    assert "is neither SmolLM2-135M-Instruct nor OWNER/MODEL" in capsys.readouterr().err
