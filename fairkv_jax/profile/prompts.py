"""Reads the prompts of a measurement from a text file or from JSON lines."""

import json
from collections.abc import Iterator
from pathlib import Path

from fairkv_jax.tokenizer import Tokenizer


def read_prompts(path: str | Path, tokenizer: Tokenizer, prompt_tokens: int) -> list[list[int]]:
    """Reads the prompts of a file and tokenizes them.

    A .jsonl file has one object per line, with a `prompt` or chat `messages`. Any other file is a
    text, which is split into prompts of `prompt_tokens` tokens; the shorter rest is left out.

    Raises:
        ValueError: a line has another format, or the file contains no prompt.
    """
    text = Path(path).read_text(encoding="utf-8")
    if Path(path).suffix == ".jsonl":
        prompts = [tokenizer.encode(prompt) for prompt in _json_lines(text, path, tokenizer)]
    else:
        ids = tokenizer.encode(text)
        ends = range(prompt_tokens, len(ids) + 1, prompt_tokens)
        prompts = [ids[end - prompt_tokens : end] for end in ends]
    if not prompts:
        raise ValueError(
            f"{path} contains no prompt: give JSON lines, or a text of at least "
            f"{prompt_tokens} tokens (--prompt-tokens)"
        )
    return prompts


def _json_lines(text: str, path: str | Path, tokenizer: Tokenizer) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} of {path} is not JSON: {error}") from error
        if isinstance(record, dict) and isinstance(record.get("prompt"), str):
            yield record["prompt"]
        elif isinstance(record, dict) and "messages" in record:
            yield tokenizer.apply_chat_template(record["messages"])
        else:
            raise ValueError(
                f"line {number} of {path} must be an object with `prompt` or `messages`"
            )
