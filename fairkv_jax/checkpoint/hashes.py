"""SHA-256 hashes of a checkpoint's files, in the format of `sha256sum`.

`fetch` records them: FILE.sha256 beside a GGUF file, and SHA256SUMS in a folder of several files.
Both can also be checked with `sha256sum --check`.
"""

import hashlib
from pathlib import Path

from fairkv_jax.checkpoint.base import CheckpointError

SUMS = "SHA256SUMS"
SUFFIX = ".sha256"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def line(digest: str, file: str) -> str:
    return f"{digest}  {file}\n"


def write_sums(folder: Path) -> None:
    """Records the hashes of all files of a folder."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != SUMS)
    (folder / SUMS).write_text("".join(line(sha256(path), path.name) for path in files))


def verify(path: Path) -> int:
    """Compares the files of a checkpoint, a file or a folder, with their recorded hashes.

    Returns the number of files.

    Raises:
        CheckpointError: a file differs or is missing, or no hashes are recorded.
    """
    records = _records(path)
    if not records:
        raise CheckpointError(
            f"no hashes of {path} are recorded: `python -m fairkv_jax.checkpoint fetch` writes "
            f"them; or write {SUMS} with sha256sum where the files are known to be intact"
        )
    for file, digest in records.items():
        try:
            actual = sha256(file)
        except OSError as error:
            raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
        if actual != digest:
            raise CheckpointError(
                f"{file} is damaged: its sha256 is {actual}, recorded is {digest}: remove it and "
                "fetch it again"
            )
    return len(records)


def _records(path: Path) -> dict[Path, str]:
    """The recorded hash of every file."""
    folder = path if path.is_dir() else path.parent
    sources = [folder / SUMS, *sorted(folder.glob(f"*{SUFFIX}"))]
    found = {}
    for source in sources:
        if not source.is_file():
            continue
        for entry in source.read_text(encoding="utf-8").splitlines():
            digest, _, name = entry.partition("  ")
            if len(digest) != 64 or not name or Path(name).name != name:
                raise CheckpointError(f"{source} is damaged: {entry[:100]!r} is no hash of a file")
            found[folder / name] = digest
    return found if path.is_dir() else {path: found[path]} if path in found else {}
