"""Opens the checkpoint at a path or of a model's name, in whatever format it is stored."""

import logging
from pathlib import Path

from fairkv_jax.checkpoint.base import Checkpoint, CheckpointError
from fairkv_jax.checkpoint.fetch import DEMO_MODEL, checkpoints_root, fetch_demo
from fairkv_jax.checkpoint.gguf_checkpoint import GGUFCheckpoint
from fairkv_jax.checkpoint.hf_checkpoint import HFCheckpoint
from fairkv_jax.checkpoint.hub import fetch_hub, is_hub_name
from fairkv_jax.checkpoint.orbax_checkpoint import MODEL_FILE, OrbaxCheckpoint

logger = logging.getLogger(__name__)


def open_checkpoint(path: str | Path, download_dir: str | Path | None = None) -> Checkpoint:
    """Opens a GGUF file, a folder that holds one, a Hugging Face folder, or a converted checkpoint.

    Args:
        path: the file or the folder; or the name of a folder in `download_dir`. The demo model and
            OWNER/MODEL of the Hugging Face Hub are fetched into it if they are not there yet.
        download_dir: None: the folder that `checkpoints_root` returns.

    Raises:
        CheckpointError: there is no checkpoint, or it cannot be fetched or read.
    """
    root = checkpoints_root() if download_dir is None else Path(download_dir).expanduser()
    found = _find(Path(path), root)
    if not found.is_dir():
        return GGUFCheckpoint(found)
    if (found / MODEL_FILE).exists():
        return OrbaxCheckpoint(found)
    if (found / "config.json").exists():
        return HFCheckpoint(found)
    files = sorted(found.glob("*.gguf"))
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise CheckpointError(
            f"the folder {found} must hold a {MODEL_FILE}, a config.json or one .gguf file to be a "
            f"checkpoint; its .gguf files are: {names}"
        )
    return GGUFCheckpoint(files[0])


def _find(path: Path, root: Path) -> Path:
    if path.exists():
        return path
    if str(path) == DEMO_MODEL and not any((root / path).glob("*.gguf")):
        return fetch_demo(root)
    if (root / path).exists():
        return root / path
    if is_hub_name(str(path)) and not path.parent.exists():
        logger.info("no checkpoint at %s, nor in %s: asking the Hugging Face Hub", path, root)
        return fetch_hub(str(path), root)
    raise CheckpointError(
        f"no checkpoint at {path}, nor in {root}: give the path of a GGUF file or of a model "
        f"folder, OWNER/MODEL of the Hugging Face Hub, or {DEMO_MODEL}, which is fetched"
    )
