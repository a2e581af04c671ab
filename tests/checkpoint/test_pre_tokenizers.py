"""How each kind of GGUF tokenizer cuts text, and what else it does."""

from itertools import pairwise
from pathlib import Path

import pytest

from fairkv_jax.checkpoint import open_checkpoint
from fairkv_jax.checkpoint.pre_tokenizers import PRE_TOKENIZERS
from tests.oracle.tiny import write_tiny_checkpoint

TEXT = "I'LL pay 12345 for HTTPServer's naïve/ok!?\n\n  \tx  e\u0301"
WORDS = {
    "gpt-2": "I|'|LL| pay| 12345| for| HTTPServer|'s| naïve|/|ok|!?|\n\n  |\t|x| | e|\u0301",
    "smollm": "I|'|LL| pay| |1|2|3|4|5| for| HTTPServer|'s| naïve|/|ok|!?|\n\n  |\t|x| | e|\u0301",
    "llama-bpe": "I|'LL| pay| |123|45| for| HTTPServer|'s| naïve|/ok|!?\n\n|  |\tx| | e|\u0301",
    "qwen2": "I|'LL| pay| |1|2|3|4|5| for| HTTPServer|'s| naïve|/ok|!?\n\n|  |\tx| | e|\u0301",
    "tekken": "I|'LL| pay| |1|2|3|4|5| for| HTTPServer|'s| naïve|/ok|!?\n\n|  |\tx| | e\u0301",
}


@pytest.mark.parametrize("kind", PRE_TOKENIZERS)
def test_words(kind):
    pieces = PRE_TOKENIZERS[kind].pre_tokenizer().pre_tokenize_str(TEXT)
    cuts = [start for _, (start, _) in pieces] + [len(TEXT)]
    words = [TEXT[start:end] for start, end in pairwise(cuts)]
    assert "|".join(words) == WORDS[kind]


def write(tmp_path: Path, kind: str) -> Path:
    return write_tiny_checkpoint(tmp_path / "tiny.gguf", pre_tokenizer=kind, num_layers=1)


@pytest.mark.parametrize("kind", PRE_TOKENIZERS)
def test_decoding_undoes_encoding(tmp_path, kind):
    tokenizer = open_checkpoint(write(tmp_path, kind)).tokenizer()
    text = "the cat and 12345 hats, 漢字 😀"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text.encode())  # "the", "and": something was merged


def test_composed_characters_of_qwen(tmp_path):
    tokenizer = open_checkpoint(write(tmp_path, "qwen2")).tokenizer()
    assert tokenizer.encode("e\u0301") == tokenizer.encode("é")


@pytest.mark.parametrize("kind", PRE_TOKENIZERS)
def test_bos_is_what_the_file_says(tmp_path, kind):
    path = write(tmp_path, kind)
    assert open_checkpoint(path).tokenizer().encode("x")[0] != 1
    silent = tmp_path / "silent.gguf"
    silent.write_bytes(path.read_bytes().replace(b"add_bos_token", b"add_bos_tokeM"))
    starts_with_bos = open_checkpoint(silent).tokenizer().encode("x")[0] == 1
    assert starts_with_bos == (kind in ("llama-bpe", "tekken"))
