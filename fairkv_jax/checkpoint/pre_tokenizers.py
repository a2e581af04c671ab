"""How byte-level BPE cuts text into words before it merges, by GGUF's `tokenizer.ggml.pre`.

The patterns are part of the models: they are those of the published tokenizers.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"

# Tekken cuts a word where its case changes: capitals first, then small letters.
_CAPITAL, _SMALL = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_TEKKEN_LETTERS = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_CAPITAL}]*[{_SMALL}]+|"
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_CAPITAL}]+[{_SMALL}]*"
)
_TEKKEN_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"


@dataclass(frozen=True)
class Rules:
    """What a kind of tokenizer does beside its vocabulary and merges."""

    pre_tokenizer: Callable[[], PreTokenizer]
    whole_words_first: bool = False
    """A word that is itself a token is not merged from its bytes."""
    adds_bos: bool = False
    """Whether a text starts with BOS where the file does not say."""
    normalizer: Callable[[], Normalizer] | None = None


def _gpt2() -> PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm() -> PreTokenizer:
    """Every digit by itself, then GPT-2's words."""
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
