"""Fetches the folder of a model from the Hugging Face Hub."""

import os
from pathlib import Path
from typing import Any

from fairkv_jax.checkpoint.base import CheckpointError
from fairkv_jax.checkpoint.hashes import write_sums

_FILES = ["config.json", "*.safetensors", "*.safetensors.index.json", "chat_template.jinja"]
_FILES += ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
# Some repositories hold the weights a second time, in the publisher's own layout.
_NOT_THESE = ["consolidated*.safetensors", "original/*", "*/*"]


def is_hub_name(name: str) -> bool:
    """Whether a name has the form OWNER/MODEL of repositories on the Hub."""
    owner, slash, model = name.partition("/")
    plain = all(part.replace("-", "").replace("_", "").replace(".", "") for part in (owner, model))
    return bool(slash) and plain and "/" not in model and not name.startswith((".", "~"))


def fetch_hub(name: str, root: Path, revision: str | None = None) -> Path:
    """Fetches a repository's model into `root`/OWNER/MODEL if needed, and returns the folder.

    Files are downloaded into a hidden folder that is renamed when the download is complete and
    its hashes have been recorded. An interrupted download continues from there, and an incomplete
    model never loads.

    Raises:
        CheckpointError: huggingface_hub is not installed, the network or the repository cannot be
            reached, or the disk is full.
    """
    folder = root / name
    if (folder / "config.json").exists():
        return folder
    partial = folder.with_name(f".{folder.name}.partial")
    _snapshot(name, revision, partial)
    if not (partial / "config.json").exists():
        raise CheckpointError(
            f"the repository {name} holds no config.json, so it is not a model folder: give one "
            "with config.json and *.safetensors"
        )
    try:
        write_sums(partial)
        os.replace(partial, folder)
    except OSError as error:
        raise CheckpointError(f"cannot keep {name} in {folder}: {error}") from error
    return folder


def _snapshot(name: str, revision: str | None, folder: Path) -> None:
    try:
        import huggingface_hub
    except ImportError as error:
        raise CheckpointError(
            f"fetching {name} from the Hub needs the package huggingface_hub: pip install "
            f"'fairkv-jax[hub]', or put its files into {folder.parent / name.rpartition('/')[2]}"
        ) from error
    options: dict[str, Any] = {"allow_patterns": _FILES, "ignore_patterns": _NOT_THESE}
    try:
        huggingface_hub.snapshot_download(name, revision=revision, local_dir=folder, **options)
    except (
        Exception
    ) as error:  # the package raises its own errors, and those of HTTP and the system
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"cannot fetch {name} from the Hub: {reason}: check the name (there is no such file or "
            "folder either), the network, and `hf auth login` for gated models, then run this again"
        ) from error
