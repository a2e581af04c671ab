"""How each kind of GGUF tokenizer splits text, and what else it does."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from gguf import TokenType

from fairkv_jax.checkpoint import CheckpointError, open_checkpoint
from fairkv_jax.checkpoint.gguf_tokenizer import PRE_TOKENIZERS
from tests.oracle.bpe import encode_by_score
from tests.oracle.tiny import PIECES, sentencepiece_tokens, write_tiny_checkpoint

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


@pytest.fixture(scope="module")
def gemma(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gemma") / "tiny.gguf"
    return write_tiny_checkpoint(path, architecture="gemma", num_layers=1)


def random_texts() -> list[str]:
    """Words of the vocabulary's pieces, spaces, and characters that the vocabulary lacks."""
    rng = np.random.default_rng(0)
    parts = [*PIECES, *"abcx é漢😀\n"]
    texts = ["".join(rng.choice(parts, 20)).replace("▁", " ") for _ in range(50)]
    return ["the  land   and\nÆ", "", *texts]


@pytest.mark.parametrize("prefix", ["", " "])
def test_sentencepiece_merges_by_score(gemma, tmp_path, prefix):
    if prefix:
        content = gemma.read_bytes()
        gemma = tmp_path / "prefix.gguf"
        gemma.write_bytes(content.replace(b"add_space_prefix", b"add_space_prefiX"))
    tokenizer = open_checkpoint(gemma).tokenizer()
    tokens = sentencepiece_tokens(384)
    ids = {text: index for index, (text, _, _) in enumerate(tokens)}
    scores = {text: score for text, score, kind in tokens if kind == TokenType.NORMAL}
    if prefix:
        scores["▁▁"] = 0.0  # merged like other pieces, before them
    for text in random_texts():
        user_defined = None if prefix else "▁▁"
        pieces = encode_by_score(text, scores, user_defined, prefix=prefix if text else "")
        assert tokenizer.encode(text) == [2, *(ids[piece] for piece in pieces)], text
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    assert tokenizer.eos_token_ids == {1}


def test_sentencepiece_needs_scores(gemma, tmp_path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(gemma.read_bytes().replace(b"tokenizer.ggml.scores", b"tokenizer.ggml.scorez"))
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.scores must be list"):
        open_checkpoint(path).tokenizer()
