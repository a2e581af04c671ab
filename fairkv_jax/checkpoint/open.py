"""From what a user names, a path, to an open checkpoint of whatever format lies there."""

from pathlib import Path

from fairkv_jax.checkpoint.base import Checkpoint, CheckpointError
from fairkv_jax.checkpoint.gguf_checkpoint import GGUFCheckpoint


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens the checkpoint at a path: a GGUF file, or a folder that holds one.

    Raises:
        CheckpointError: nothing is there, or it cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"no checkpoint at {path}: give the path of a GGUF file")
    if not path.is_dir():
        return GGUFCheckpoint(path)
    files = sorted(path.glob("*.gguf"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise CheckpointError(
            f"the folder {path} must hold one .gguf file to be a checkpoint, found: {found}"
        )
    return GGUFCheckpoint(files[0])
