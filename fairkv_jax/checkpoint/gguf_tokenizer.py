"""The tokenizer that lies in a GGUF file's metadata."""

from typing import Any

from tokenizers import AddedToken, decoders, models, processors
from tokenizers import Tokenizer as Backend

from fairkv_jax.checkpoint.base import CheckpointError
from fairkv_jax.checkpoint.gguf_file import GGUFFile
from fairkv_jax.checkpoint.pre_tokenizers import PRE_TOKENIZERS
from fairkv_jax.tokenizer import Tokenizer

CONTROL, USER_DEFINED = 3, 4  # of the format's token types

# Ends of a turn or a text, which files do not always announce by a key of their own.
_END_TEXTS = ("<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<|end_of_text|>")
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


def build_tokenizer(file: GGUFFile) -> Tokenizer:
    """Builds the byte-level BPE tokenizer of a GGUF file.

    Raises:
        CheckpointError: the file has none, or one of another kind; what is supported is named.
    """
    kind = _get(file, "model", str)
    if kind != "gpt2":
        raise CheckpointError(
            f"{file.path} has a tokenizer of the kind {kind!r}, supported is 'gpt2' "
            "(byte-level BPE): choose a checkpoint that has one"
        )
    pre = _get(file, "pre", str)
    if pre not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"{file.path} has the pre-tokenizer {pre!r}, supported are "
            f"{', '.join(PRE_TOKENIZERS)}: choose a checkpoint that has one of these"
        )
    rules = PRE_TOKENIZERS[pre]
    texts, kinds = _tokens(file)
    vocabulary, merges = _vocabulary(file, texts), _merges(file)
    try:
        model = models.BPE(vocabulary, merges, ignore_merges=rules.whole_words_first)
        backend = Backend(model)
    except Exception as error:  # the package raises no narrower type
        raise CheckpointError(f"{file.path}: the tokenizer's merges are broken: {error}") from error
    if rules.normalizer is not None:
        backend.normalizer = rules.normalizer()
    backend.pre_tokenizer = rules.pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(
        [
            AddedToken(text, special=kind == CONTROL, normalized=False)
            for text, kind in zip(texts, kinds, strict=True)
            if kind in (CONTROL, USER_DEFINED)
        ]
    )
    tokens = _special_tokens(file, texts)
    if file.metadata.get("tokenizer.ggml.add_bos_token", rules.adds_bos) and "bos_token" in tokens:
        bos = tokens["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, texts.index(bos))]
        )
    return Tokenizer(
        backend,
        eos_token_ids=_end_ids(file, texts, kinds),
        chat_template=file.metadata.get("tokenizer.chat_template"),
        template_tokens=tokens,
    )


def _get(file: GGUFFile, key: str, kind: type) -> Any:
    value = file.metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(value, kind):
        raise CheckpointError(
            f"{file.path}: tokenizer.ggml.{key} must be {kind.__name__}, got "
            f"{type(value).__name__}: the file carries no usable tokenizer"
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


def _merges(file: GGUFFile) -> list[tuple[str, str]]:
    """Pairs of parts; byte-level tokens hold no space, so the first one separates them."""
    pairs = [merge.partition(" ") for merge in _get(file, "merges", list)]
    return [(left, right) for left, _, right in pairs]


def _special_tokens(file: GGUFFile, texts: list[str]) -> dict[str, str]:
    """The texts of the special tokens under the names by which chat templates call them."""
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    tokens = {}
    for key, name in names.items():
        index = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(index, int) and index < len(texts):
            tokens[f"{name}_token"] = texts[index]
    return tokens


def _end_ids(file: GGUFFile, texts: list[str], kinds: list[int]) -> set[int]:
    keys = [f"tokenizer.ggml.{key}" for key in _END_KEYS]
    announced = {file.metadata[key] for key in keys if key in file.metadata}
    known = {i for i, text in enumerate(texts) if text in _END_TEXTS and kinds[i] == CONTROL}
    return announced | known
