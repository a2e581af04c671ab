"""The tokenizer in a GGUF file's metadata: byte-level BPE ("gpt2") or SentencePiece BPE ("llama").

How byte-level BPE splits text into words before it merges is named by `tokenizer.ggml.pre`. The
patterns are part of the models; they are those of the published tokenizers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers import Tokenizer as Backend
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer

from fairkv_jax.checkpoint.base import CheckpointError
from fairkv_jax.checkpoint.gguf_file import GGUFFile
from fairkv_jax.token_bytes import SENTENCEPIECE_SPACE as SPACE
from fairkv_jax.tokenizer import Tokenizer

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # the format's token types

# Tokens that end a turn or a text, which files do not always name under a key.
_END_TEXTS = ("<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>")
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"

# Tekken splits a word where its case changes: capitals first, then small letters.
_CAPITAL, _SMALL = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_TEKKEN_LETTERS = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_CAPITAL}]*[{_SMALL}]+|"
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_CAPITAL}]+[{_SMALL}]*"
)
_TEKKEN_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"


@dataclass(frozen=True)
class Rules:
    """The rules of a byte-level tokenizer besides its vocabulary and merges."""

    pre_tokenizer: Callable[[], PreTokenizer]
    whole_words_first: bool = False
    """Whether a word that is a token is taken whole instead of being merged from its bytes."""
    adds_bos: bool = False
    """Whether a text starts with BOS if the file does not say."""
    normalizer: Callable[[], Normalizer] | None = None


def _gpt2() -> PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm() -> PreTokenizer:
    """Single digits, then GPT-2's words."""
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, _gpt2()])


def _by_pattern(*parts: str) -> Callable[[], PreTokenizer]:
    def build() -> PreTokenizer:
        words = pre_tokenizers.Split(Regex("|".join(parts)), behavior="isolated")
        symbols = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([words, symbols])

    return build


PRE_TOKENIZERS = {
    "smollm": Rules(_smollm),
    "gpt-2": Rules(_gpt2),
    "llama-bpe": Rules(
        _by_pattern(_CONTRACTION, _LETTERS, r"\p{N}{1,3}", _SYMBOLS, _SPACE),
        whole_words_first=True,
        adds_bos=True,
    ),
    "qwen2": Rules(
        _by_pattern(_CONTRACTION, _LETTERS, r"\p{N}", _SYMBOLS, _SPACE), normalizer=normalizers.NFC
    ),
    "tekken": Rules(
        _by_pattern(_TEKKEN_LETTERS, r"\p{N}", _TEKKEN_SYMBOLS, _SPACE),
        whole_words_first=True,
        adds_bos=True,
    ),
}


def build_tokenizer(file: GGUFFile) -> Tokenizer:
    """Builds the tokenizer of a GGUF file.

    Raises:
        CheckpointError: the file has no tokenizer, or one of an unsupported kind.
    """
    kind = _get(file, "model", str)
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(
            f"{file.path} has a tokenizer of the kind {kind!r}, supported are 'gpt2' (byte-level "
            "BPE) and 'llama' (SentencePiece): choose a checkpoint that has one of these"
        )
    texts, kinds = _tokens(file)
    try:
        if kind == "gpt2":
            backend, adds_bos = _byte_level(file, texts)
        else:
            backend, adds_bos = _sentencepiece(file, texts, kinds), True
    except CheckpointError:
        raise
    except Exception as error:  # the package raises nothing narrower
        raise CheckpointError(f"{file.path}: the tokenizer's merges are broken: {error}") from error
    # SentencePiece finds user-defined pieces, such as runs of spaces, in the normalized text. A
    # normalizer that adds a prefix would change these pieces too, so they are then found verbatim.
    is_normalized = kind == "llama" and not _adds_space_prefix(file)
    backend.add_tokens(
        [
            AddedToken(
                text,
                special=kind == CONTROL,
                normalized=is_normalized and kind == USER_DEFINED,
            )
            for text, kind in zip(texts, kinds, strict=True)
            if kind in (CONTROL, USER_DEFINED)
        ]
    )
    tokens = _special_tokens(file, texts)
    if file.metadata.get("tokenizer.ggml.add_bos_token", adds_bos) and "bos_token" in tokens:
        bos = tokens["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, texts.index(bos))]
        )
    return Tokenizer(
        backend,
        eos_token_ids=_end_ids(file, texts, kinds),
        chat_template=file.metadata.get("tokenizer.chat_template"),
        tool_use_template=file.metadata.get("tokenizer.chat_template.tool_use"),
        template_tokens=tokens,
    )


def _byte_level(file: GGUFFile, texts: list[str]) -> tuple[Backend, bool]:
    """Byte-level BPE, and whether its texts start with BOS by default."""
    pre = _get(file, "pre", str)
    if pre not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"{file.path} has the pre-tokenizer {pre!r}, supported are "
            f"{', '.join(PRE_TOKENIZERS)}: choose a checkpoint that has one of these"
        )
    rules = PRE_TOKENIZERS[pre]
    # Byte-level tokens hold no space, so the first one separates the parts of a merge.
    pairs = [merge.partition(" ") for merge in _get(file, "merges", list)]
    merges = [(left, right) for left, _, right in pairs]
    vocabulary = _vocabulary(file, texts)
    backend = Backend(models.BPE(vocabulary, merges, ignore_merges=rules.whole_words_first))
    if rules.normalizer is not None:
        backend.normalizer = rules.normalizer()
    backend.pre_tokenizer = rules.pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    return backend, rules.adds_bos


def _sentencepiece(file: GGUFFile, texts: list[str], kinds: list[int]) -> Backend:
    """SentencePiece's BPE: characters merge by score, and unknown ones become bytes."""
    scores = _get(file, "scores", list)
    if len(scores) != len(texts):
        raise CheckpointError(
            f"{file.path}: {len(texts)} tokens, but {len(scores)} scores: the file is damaged"
        )
    unknown = next((text for text, kind in zip(texts, kinds, strict=True) if kind == UNKNOWN), None)
    vocabulary = _vocabulary(file, texts)
    merges = _merges_by_score(texts, scores, vocabulary)
    backend = Backend(
        models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    space = normalizers.Replace(" ", SPACE)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if _adds_space_prefix(file):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), space])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = space
    backend.decoder = decoders.Sequence(steps)
    return backend


def _adds_space_prefix(file: GGUFFile) -> bool:
    """Whether SentencePiece puts a space in front of texts, so that a first word is like others."""
    return file.metadata.get("tokenizer.ggml.add_space_prefix", True)


def _merges_by_score(
    texts: list[str], scores: list[float], vocabulary: dict[str, int]
) -> list[tuple[str, str]]:
    """Every pair of tokens that forms another token, the highest score first.

    SentencePiece merges the adjacent pair whose result has the highest score; BPE merges the pair
    of the lowest rank.
    """
    merges = []
    for index in sorted(range(len(texts)), key=lambda index: -scores[index]):
        text = texts[index]
        splits = ((text[:end], text[end:]) for end in range(1, len(text)))
        merges += [pair for pair in splits if pair[0] in vocabulary and pair[1] in vocabulary]
    return merges


def _get(file: GGUFFile, key: str, kind: type) -> Any:
    value = file.metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(value, kind):
        raise CheckpointError(
            f"{file.path}: tokenizer.ggml.{key} must be {kind.__name__}, got "
            f"{type(value).__name__}: the file holds no usable tokenizer"
        )
    return value


def _tokens(file: GGUFFile) -> tuple[list[str], list[int]]:
    """The text and the type of every token, by id."""
    texts, kinds = _get(file, "tokens", list), _get(file, "token_type", list)
    if len(texts) != len(kinds):
        raise CheckpointError(
            f"{file.path}: {len(texts)} tokens, but {len(kinds)} token types: the file is damaged"
        )
    return texts, kinds


def _vocabulary(file: GGUFFile, texts: list[str]) -> dict[str, int]:
    vocabulary = {text: index for index, text in enumerate(texts)}
    if len(vocabulary) != len(texts):
        raise CheckpointError(
            f"{file.path}: {len(texts) - len(vocabulary)} of {len(texts)} tokens repeat another: "
            "the file is damaged"
        )
    return vocabulary


def _special_tokens(file: GGUFFile, texts: list[str]) -> dict[str, str]:
    """The texts of the special tokens, under the names that chat templates use."""
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    tokens = {}
    for key, name in names.items():
        index = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(index, int) and index < len(texts):
            tokens[f"{name}_token"] = texts[index]
    return tokens


def _end_ids(file: GGUFFile, texts: list[str], kinds: list[int]) -> set[int]:
    keys = [f"tokenizer.ggml.{key}" for key in _END_KEYS]
    named = {file.metadata[key] for key in keys if key in file.metadata}
    known = {i for i, text in enumerate(texts) if text in _END_TEXTS and kinds[i] == CONTROL}
    return named | known
