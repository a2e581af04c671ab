"""The tokenizer of a Hugging Face folder: tokenizer.json and the small files around it."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from fairkv_jax.checkpoint.base import CheckpointError
from fairkv_jax.checkpoint.json_file import read_object
from fairkv_jax.tokenizer import Tokenizer

_TEMPLATE_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def build_tokenizer(folder: Path) -> Tokenizer:
    """Builds the tokenizer of a model folder.

    Raises:
        CheckpointError: there is no tokenizer.json, or a file beside it is damaged.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        raise CheckpointError(
            f"{folder} has no tokenizer.json: a tokenizer.model alone is not read; take a "
            "repository that has both"
        )
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the package raises no narrower type
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    backend.no_truncation()  # files may carry the settings of a training run
    backend.no_padding()
    options = _load(folder / "tokenizer_config.json")
    tokens = {key: _text(options[key]) for key in _TEMPLATE_TOKENS if options.get(key)}
    return Tokenizer(
        backend,
        eos_token_ids=_end_ids(folder, backend, tokens.get("eos_token")),
        chat_template=_chat_template(folder, options),
        template_tokens=tokens,
    )


def _end_ids(folder: Path, backend: Backend, eos_token: str | None) -> set[int]:
    """What the generation's and the model's configurations announce, and the tokenizer's own."""
    ends: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        announced = _load(folder / name).get("eos_token_id")
        if announced is not None:
            ends |= set(announced if isinstance(announced, list) else [announced])
    own = backend.token_to_id(eos_token) if eos_token else None
    return ends if own is None else ends | {own}


def _chat_template(folder: Path, options: dict[str, Any]) -> str | None:
    """The template of a file of its own, else of the options: one, or the default of several."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    template = options.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default")
    return template


def _text(token: str | dict[str, Any]) -> str:
    """A token is given as its text, or as an object with its matching rules."""
    return token["content"] if isinstance(token, dict) else token


def _load(path: Path) -> dict[str, Any]:
    """A JSON object, {} where there is no such file."""
    return read_object(path) if path.exists() else {}
