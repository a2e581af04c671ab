"""Fetches a model's folder from the Hugging Face Hub, where there is a network."""

import os
from pathlib import Path
from typing import Any

from fairkv_jax.checkpoint.base import CheckpointError

_FILES = ["config.json", "*.safetensors", "*.safetensors.index.json", "chat_template.jinja"]
_FILES += ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
# Some repositories hold the weights again, in their publisher's own layout.
_NOT_THESE = ["consolidated*.safetensors", "original/*", "*/*"]


def is_hub_name(name: str) -> bool:
    """Whether a name has the form OWNER/MODEL of the Hub's repositories."""
    owner, slash, model = name.partition("/")
    plain = all(part.replace("-", "").replace("_", "").replace(".", "") for part in (owner, model))
    return bool(slash) and plain and "/" not in model and not name.startswith((".", "~"))


def fetch_hub(name: str, root: Path, revision: str | None = None) -> Path:
    """Makes sure that the repository's model lies in `root`/OWNER/MODEL and returns the folder.

    What has arrived is kept beside it until all has, so that an interrupted run goes on from there
    and nothing partial ever loads.

    Raises:
        CheckpointError: no huggingface_hub, no network, no such repository, or the disk is full.
    """
    folder = root / name
    if (folder / "config.json").exists():
        return folder
    partial = folder.with_name(f".{folder.name}.partial")
    _snapshot(name, revision, partial)
    if not (partial / "config.json").exists():
        raise CheckpointError(
            f"the repository {name} holds no config.json: it is no model folder; give one with "
            "config.json and *.safetensors"
        )
    try:
        os.replace(partial, folder)
    except OSError as error:
        raise CheckpointError(f"cannot keep {name} in {folder}: {error}") from error
    return folder


def _snapshot(name: str, revision: str | None, folder: Path) -> None:
    try:
        import huggingface_hub
    except ImportError as error:
        raise CheckpointError(
            f"fetching {name} from the Hub takes the package huggingface_hub: pip install "
            f"'fairkv-jax[hub]', or put its files into {folder.parent / name.rpartition('/')[2]}"
        ) from error
    options: dict[str, Any] = {"allow_patterns": _FILES, "ignore_patterns": _NOT_THESE}
    try:
        huggingface_hub.snapshot_download(name, revision=revision, local_dir=folder, **options)
    except Exception as error:  # the package raises its own, its transport's and the system's
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"cannot fetch {name} from the Hub: {reason}: check the name (no file or folder is "
            "called so), the network, and for gated models `hf auth login`; run this again to go on"
        ) from error
