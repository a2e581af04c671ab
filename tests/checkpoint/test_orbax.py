"""Converted checkpoints: the same model, whole or not at all, and no damaged byte passes."""

import fcntl
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fairkv_jax.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from fairkv_jax.checkpoint import convert as convert_module
from fairkv_jax.checkpoint.__main__ import main
from fairkv_jax.checkpoint.base import LazyTensor
from fairkv_jax.checkpoint.convert import convert
from fairkv_jax.checkpoint.orbax_checkpoint import record_checksum
from fairkv_jax.plan import Profile
from tests.oracle.tiny import write_tiny_checkpoint
from tests.oracle.tiny_hf import write_tiny_folder

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "llama3": {"rope_scaling": LLAMA3},
    "qwen2": {"architecture": "qwen2", "tie_word_embeddings": False},
    "qwen3": {"architecture": "qwen3"},
    "gemma": {"architecture": "gemma"},
}


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("gguf") / "Tiny.gguf")


@pytest.fixture
def small_chunks(monkeypatch) -> None:
    """Matrices of the tiny model in several chunks, as large ones have."""
    monkeypatch.setattr(convert_module, "CHUNK_BYTES", 5000)


@pytest.fixture
def converted(gguf, tmp_path, small_chunks) -> Path:
    return convert(open_checkpoint(gguf), tmp_path / "converted")


@pytest.mark.parametrize("options", FAMILIES.values(), ids=FAMILIES.keys())
def test_the_same_model_comes_back(tmp_path, small_chunks, options):
    source = open_checkpoint(write_tiny_checkpoint(tmp_path / "Tiny.gguf", **options))
    copy = open_checkpoint(convert(source, tmp_path / "converted"))
    assert copy.config == source.config
    assert copy.name == source.name
    assert copy.names() == source.names()
    for name in source.names():
        np.testing.assert_array_equal(copy.tensor(name), source.tensor(name), err_msg=name)
        assert copy.tensor(name).dtype == source.tensor(name).dtype


@pytest.mark.parametrize(("dtype", "kind"), [(None, "float16"), ("bfloat16", "bfloat16")])
def test_types_are_kept_or_changed(gguf, tmp_path, dtype, kind):
    source = open_checkpoint(write_tiny_folder(tmp_path / "hf", gguf, dtype="F16"))
    copy = open_checkpoint(convert(source, tmp_path / "converted", dtype))
    assert copy.stored("layers.0.gate") == (kind, 96 * 48 * 2)
    expected = source.tensor("layers.1.o").astype(kind)
    np.testing.assert_array_equal(copy.tensor("layers.1.o"), expected)


def test_the_tokenizer_and_the_profile_come_along(gguf, tmp_path):
    folder = write_tiny_folder(tmp_path / "hf", gguf)
    profile = Profile.uniform(2, 3, 7.0)
    (folder / "profile.json").write_text(profile.to_json())
    source = open_checkpoint(folder)
    copy = open_checkpoint(convert(source, tmp_path / "converted"))
    assert copy.profile == source.profile == profile
    expected, tokenizer = source.tokenizer(), copy.tokenizer()
    text = "<|im_start|>the cat and 12 hats, 漢字<|im_end|>"
    assert tokenizer.encode(text) == expected.encode(text)
    assert tokenizer.eos_token_ids == expected.eos_token_ids == {0, 2}
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat) == expected.apply_chat_template(chat)


def test_a_broken_profile_is_named(gguf, tmp_path):
    folder = write_tiny_folder(tmp_path / "hf", gguf)
    (folder / "profile.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"profile\.json cannot be read"):
        convert(open_checkpoint(folder), tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


def test_rows_are_read_without_the_rest(gguf, converted):
    tensor = open_checkpoint(converted).lazy("embed")
    assert tensor.block == 24  # the divisor of 384 rows of 192 bytes that is closest to 5000 bytes
    expected = open_checkpoint(gguf).tensor("embed")
    for start, stop in [(0, 1), (5, 200), (383, 384)]:
        np.testing.assert_array_equal(tensor.read(start, stop), expected[start:stop])


def read_all(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    checkpoint.tokenizer()
    for name in checkpoint.names():
        checkpoint.tensor(name)


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x40
    path.write_bytes(content)


def complaints(folder: Path, expected: dict[str, np.ndarray]) -> list[str]:
    """What is said of tensors that are damaged; the others must be right."""
    checkpoint, said = open_checkpoint(folder), []
    for name, value in expected.items():
        try:
            np.testing.assert_array_equal(checkpoint.tensor(name), value)
        except CheckpointError as error:
            said.append(f"{name}: {error}")
    return said


@pytest.fixture
def expected(converted) -> dict[str, np.ndarray]:
    checkpoint = open_checkpoint(converted)
    return {name: checkpoint.tensor(name) for name in checkpoint.names()}


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "params").rglob("*") if path.is_file())


def test_no_flipped_byte_passes(converted, expected):
    rng = np.random.default_rng(0)
    said = []
    for path in files_of(converted):
        for offset in rng.integers(0, path.stat().st_size, 8):
            flip(path, offset)
            said += complaints(converted, expected)
            flip(path, offset)
    assert len(said) > 20
    for complaint in said:
        assert f"tensor {complaint.partition(':')[0]!r} is damaged" in complaint
    assert not complaints(converted, expected)


def test_no_truncated_or_missing_file_passes(converted, expected):
    said = []
    for path in files_of(converted):
        content = path.read_bytes()
        for length in (0, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:length])
            said += complaints(converted, expected)
        path.unlink()
        said += complaints(converted, expected)
        path.write_bytes(content)
    assert len(said) > 100
    for complaint in said:
        assert f"tensor {complaint.partition(':')[0]!r} is damaged" in complaint


def test_the_byte_of_a_tensor_is_that_tensors_error(gguf, converted):
    needle = open_checkpoint(gguf).tensor("layers.1.k")[1].tobytes()
    for path in (converted / "params").rglob("*"):
        if path.is_file() and (offset := path.read_bytes().find(needle)) >= 0:
            flip(path, offset + 100)
    checkpoint = open_checkpoint(converted)
    with pytest.raises(CheckpointError, match=r"tensor 'layers\.1\.k' is damaged in the rows from"):
        checkpoint.tensor("layers.1.k")
    checkpoint.tensor("layers.0.k")


@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [
        (
            "model.json",
            lambda c: c.replace('"rope_theta": 1', '"rope_theta": 2'),
            "model.json is damaged",
        ),
        (
            "model.json",
            lambda c: c.replace('"format": 1', '"format": 2'),
            "format 2, supported",
        ),
        ("model.json", lambda c: c[: len(c) // 2], "model.json is damaged"),
        ("tokenizer.json", lambda c: c.replace("the", "teh"), "tokenizer.json is damaged"),
        ("tokenizer_config.json", None, "lacks tokenizer_config.json"),
    ],
)
def test_the_small_files_are_checked_too(converted, name, change, complaint):
    path = converted / name
    if change is None:
        path.unlink()
    else:
        changed = change(path.read_text())
        assert changed != path.read_text()
        path.write_text(changed)
    with pytest.raises(CheckpointError, match=complaint):
        read_all(converted)


@pytest.mark.parametrize("step", ["_write_params", "_write_record"])
def test_a_killed_conversion_leaves_nothing_that_loads(gguf, tmp_path, monkeypatch, step):
    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    target = tmp_path / "converted"
    with monkeypatch.context() as patch:
        patch.setattr(convert_module, step, killed)
        with pytest.raises(KeyboardInterrupt):
            convert(open_checkpoint(gguf), target)
    assert not target.exists()
    for left in tmp_path.iterdir():
        with pytest.raises(CheckpointError):
            open_checkpoint(left)
    read_all(convert(open_checkpoint(gguf), target))
    assert [path.name for path in tmp_path.iterdir()] == ["converted"]


class EarlierNames:
    """A checkpoint with the tensor names of the first converted checkpoints."""

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checkpoint, name)

    def names(self) -> tuple[str, ...]:
        return tuple(name.replace("lm_head", "unembed") for name in self._checkpoint.names())

    def lazy(self, name: str) -> LazyTensor:
        return self._checkpoint.lazy(name.replace("unembed", "lm_head"))


def test_checkpoints_of_earlier_versions_load(tmp_path, small_chunks):
    """They call lm_head "unembed", and their configuration lacks the fields that Gemma needs."""
    path = write_tiny_checkpoint(tmp_path / "Tiny.gguf", tie_word_embeddings=False)
    source = open_checkpoint(path)
    earlier: Any = EarlierNames(source)
    folder = convert(earlier, tmp_path / "converted")
    record = json.loads((folder / "model.json").read_text())
    assert "unembed" in record["tensors"]
    assert "lm_head" not in record["tensors"]
    for key in ("activation", "norm_offset", "scale_embeddings"):
        del record["config"][key]
    record["sha256"] = record_checksum(record)
    (folder / "model.json").write_text(json.dumps(record))
    copy = open_checkpoint(folder)
    assert copy.config == source.config
    assert copy.names() == source.names()
    for name in ("lm_head", "embed"):
        np.testing.assert_array_equal(copy.tensor(name), source.tensor(name))
        assert copy.stored(name) == ("float32", 384 * 48 * 4)
    again = open_checkpoint(convert(copy, tmp_path / "again"))
    np.testing.assert_array_equal(again.tensor("lm_head"), source.tensor("lm_head"))


def test_nothing_is_overwritten(gguf, converted):
    with pytest.raises(CheckpointError, match="exists already"):
        convert(open_checkpoint(gguf), converted)


def test_orbax_itself_reads_the_parameters(gguf, converted):
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.restore(converted / "params")
    expected = open_checkpoint(gguf)
    np.testing.assert_array_equal(tree["layers.0.q"], expected.tensor("layers.0.q"))
    rows = tree["layers.0.gate"].reshape(-1, 48)
    np.testing.assert_array_equal(rows, expected.tensor("layers.0.gate"))


def test_the_commands(gguf, tmp_path, capsys):
    target = tmp_path / "converted"
    assert main(["convert", str(gguf), str(target)]) == 0
    assert capsys.readouterr().out.strip() == str(target)
    assert main(["inspect", str(target), "--devices", "2"]) == 0
    shown = capsys.readouterr().out
    assert "layers.1.q               3 × 2 × 16 × 48      float32" in shown
    assert "each of 2 devices, fair_copying, bfloat16:" in shown
    assert "a token that all keep               384 bytes" in shown  # 2 x 3 heads x 16 x k and v
    assert main(["inspect", str(target), "--devices", "2", "--kv-cache-dtype", "int8"]) == 0
    assert "a token that all keep               216 bytes" in capsys.readouterr().out
    assert main(["convert", str(gguf), str(target)]) == 1
    assert "exists already" in capsys.readouterr().err
    assert json.loads((target / "model.json").read_text())["name"] == "Tiny"


def test_a_disk_that_is_full_is_a_sentence_and_nothing_is_left(gguf, tmp_path):
    """The limit on the size of files stands for a disk that fills up in the middle."""
    code = (
        "import resource, sys; from fairkv_jax.checkpoint.__main__ import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
        f"sys.exit(main(['convert', {str(gguf)!r}, {str(tmp_path / 'converted')!r}]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    expected = f"error: cannot write {tmp_path / 'converted'}: File too large\n"
    assert result.stderr == expected
    assert list(tmp_path.iterdir()) == []


def test_a_limit_of_memory_is_a_sentence(gguf, monkeypatch, capsys):
    def out_of_memory(source: str) -> None:
        raise MemoryError

    monkeypatch.setattr("fairkv_jax.checkpoint.__main__.open_checkpoint", out_of_memory)
    assert main(["inspect", str(gguf)]) == 1
    assert "the process may not take more memory" in capsys.readouterr().err


def test_a_disk_without_room_is_refused_before_anything_is_written(gguf, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"0\.00 GiB are free on the disk"):
        convert(open_checkpoint(gguf), tmp_path / "converted")
    assert list(tmp_path.iterdir()) == []


def test_a_second_conversion_to_one_target_is_refused_at_once(gguf, tmp_path):
    with (tmp_path / ".converted.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="another process is converting to"):
            convert(open_checkpoint(gguf), tmp_path / "converted")
