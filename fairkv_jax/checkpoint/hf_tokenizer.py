"""The tokenizer of a Hugging Face folder: tokenizer.json and the files that complete it.

Converted checkpoints store their tokenizer in the same files.
"""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from fairkv_jax.checkpoint.base import CheckpointError
from fairkv_jax.checkpoint.files import read_object
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
    except Exception as error:  # the package raises nothing narrower
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    backend.no_truncation()  # files may hold the settings of a training run
    backend.no_padding()
    options = _load(folder / "tokenizer_config.json")
    tokens = {key: _text(options[key]) for key in _TEMPLATE_TOKENS if options.get(key)}
    return Tokenizer(
        backend,
        eos_token_ids=_end_ids(folder, backend, tokens.get("eos_token")),
        chat_template=_chat_template(folder, options),
        tool_use_template=_tool_use_template(folder, options),
        template_tokens=tokens,
    )


def _end_ids(folder: Path, backend: Backend, eos_token: str | None) -> set[int]:
    """End tokens that the generation, model and tokenizer configurations name."""
    ends: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        found = _load(folder / name).get("eos_token_id")
        if found is not None:
            ends |= set(found if isinstance(found, list) else [found])
    own = backend.token_to_id(eos_token) if eos_token else None
    return ends if own is None else ends | {own}


def _chat_template(folder: Path, options: dict[str, Any]) -> str | None:
    """The template in its own file, or else in the options: the only one or the default one."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    template = options.get("chat_template")
    return _by_name(template).get("default") if isinstance(template, list) else template


def _tool_use_template(folder: Path, options: dict[str, Any]) -> str | None:
    """The template of conversations with tools, if it has a file or a name of its own."""
    path = folder / "additional_chat_templates" / "tool_use.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    template = options.get("chat_template")
    return _by_name(template).get("tool_use") if isinstance(template, list) else None


def _by_name(templates: list[dict[str, str]]) -> dict[str, str]:
    return {entry["name"]: entry["template"] for entry in templates}


def _text(token: str | dict[str, Any]) -> str:
    """The text of a token, which is given as a string or as an object with matching rules."""
    return token["content"] if isinstance(token, dict) else token


def _load(path: Path) -> dict[str, Any]:
    """The JSON object in a file, {} if there is no such file."""
    return read_object(path) if path.exists() else {}
