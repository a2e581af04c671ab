"""Writes tiny random checkpoints as real GGUF files, so that tests load what users load."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from gguf import GGUFWriter, TokenType
from tokenizers.pre_tokenizers import ByteLevel

from tests.oracle.forward import llama3_divisors

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("Ġ t", "h e", "Ġt he", "i n", "Ġ a", "a n", "an d", "o n", "e r", "r e", "Ġ w", "l l")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_tiny_checkpoint(
    path: Path,
    *,
    num_layers: int = 2,
    num_heads: int = 6,
    num_kv_heads: int = 3,
    head_dim: int = 16,
    hidden_size: int = 48,
    intermediate_size: int = 96,
    vocab_size: int = 384,
    max_position_embeddings: int = 2048,
    rope_theta: float = 10000.0,
    tie_word_embeddings: bool = True,
    architecture: str = "llama",
    rope_scaling: Mapping[str, float] | None = None,
    sliding_window: int | None = None,
    pre_tokenizer: str = "smollm",
    seed: int = 0,
) -> Path:
    """Writes a model with random float32 weights and a byte-level tokenizer; returns `path`.

    The architecture is "llama", "qwen2" (with biases), "qwen3" (with norms of heads) or "gemma";
    only Llama's q and k rows are interleaved. `rope_scaling` is Llama 3.1's, as in config.json.

    Queries and keys are large enough for attention to prefer some tokens clearly, the residual
    branches for the context to decide the next token: greedy outputs vary, without near-ties.
    """
    writer = GGUFWriter(path, architecture)
    writer.add_name("Tiny")
    writer.add_block_count(num_layers)
    writer.add_context_length(max_position_embeddings)
    writer.add_embedding_length(hidden_size)
    writer.add_feed_forward_length(intermediate_size)
    writer.add_head_count(num_heads)
    writer.add_head_count_kv(num_kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope_theta)
    writer.add_layer_norm_rms_eps(1e-5)
    if sliding_window is not None:
        writer.add_sliding_window(sliding_window)
    writer.add_vocab_size(vocab_size)
    if architecture == "gemma":
        _add_sentencepiece(writer, vocab_size)
    else:
        _add_tokenizer(writer, vocab_size, pre_tokenizer)
    if rope_scaling is not None:
        divisors = llama3_divisors(head_dim, rope_theta, rope_scaling)
        writer.add_tensor("rope_freqs.weight", divisors)

    rng = np.random.default_rng(seed)
    D, F = hidden_size, intermediate_size

    def add_matrix(name: str, rows: int, columns: int, gain: float, heads: int = 0) -> None:
        matrix = rng.standard_normal((rows, columns), dtype=np.float32)
        matrix *= np.float32(gain / np.sqrt(columns))
        interleaved = heads and architecture == "llama"
        writer.add_tensor(f"{name}.weight", _interleave(matrix, heads) if interleaved else matrix)

    def add_norm(name: str, size: int = D, noise: float = 0.1) -> None:
        deviations = rng.standard_normal(size, dtype=np.float32)
        writer.add_tensor(f"{name}.weight", 1 + np.float32(noise) * deviations)

    def add_bias(name: str, rows: int) -> None:
        writer.add_tensor(f"{name}.bias", rng.standard_normal(rows, dtype=np.float32))

    # Gemma multiplies embeddings by sqrt(D) itself.
    add_matrix("token_embd", vocab_size, D, gain=1.0 if architecture == "gemma" else np.sqrt(D))
    for layer in range(num_layers):
        block = f"blk.{layer}"
        add_norm(f"{block}.attn_norm")
        add_matrix(f"{block}.attn_q", num_heads * head_dim, D, 1.5, heads=num_heads)
        add_matrix(f"{block}.attn_k", num_kv_heads * head_dim, D, 1.5, heads=num_kv_heads)
        add_matrix(f"{block}.attn_v", num_kv_heads * head_dim, D, 2.0)
        if architecture == "qwen2":
            for name, heads in (("q", num_heads), ("k", num_kv_heads), ("v", num_kv_heads)):
                add_bias(f"{block}.attn_{name}", heads * head_dim)
        if architecture == "qwen3":
            for name in ("q", "k"):
                add_norm(f"{block}.attn_{name}_norm", head_dim, noise=0.5)
        add_matrix(f"{block}.attn_output", D, num_heads * head_dim, 2.0)
        add_norm(f"{block}.ffn_norm")
        add_matrix(f"{block}.ffn_gate", F, D, 1.5)
        add_matrix(f"{block}.ffn_up", F, D, 1.5)
        add_matrix(f"{block}.ffn_down", D, F, 2.0)
    add_norm("output_norm")
    if not tie_word_embeddings:
        add_matrix("output", vocab_size, D, gain=np.sqrt(D))

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _interleave(matrix: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's row order: row i of a head's first half, then row i of its second, i = 0, 1..."""
    rows = matrix.shape[0] // heads
    order = [
        head * rows + half * (rows // 2) + i
        for head in range(heads)
        for i in range(rows // 2)
        for half in range(2)
    ]
    return matrix[order]


def token_texts(vocab_size: int) -> list[str]:
    """Control tokens, the 256 bytes, the merges' results, then unused tokens up to the size."""
    texts = [*CONTROL_TOKENS, *sorted(ByteLevel.alphabet())]
    texts += [merge.replace(" ", "") for merge in MERGES]
    if vocab_size < len(texts):
        raise ValueError(f"vocab_size must be at least {len(texts)}, got {vocab_size}")
    return [*texts, *(f"[unused{i}]" for i in range(vocab_size - len(texts)))]


def _token_type(text: str) -> TokenType:
    if text in CONTROL_TOKENS:
        return TokenType.CONTROL
    return TokenType.UNUSED if text.startswith("[unused") else TokenType.NORMAL


def _add_tokenizer(writer: GGUFWriter, vocab_size: int, pre_tokenizer: str) -> None:
    texts = token_texts(vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(texts)
    writer.add_token_types([_token_type(text) for text in texts])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


PIECES = ("▁t", "he", "▁the", "in", "▁a", "an", "and", "▁and", "on", "er", "ing", "▁w", "ll", "▁▁")


def sentencepiece_tokens(vocab_size: int) -> list[tuple[str, float, TokenType]]:
    """Text, score and type by id: Gemma's control tokens, bytes, pieces, characters, unused ones.

    Pieces score higher the earlier they were learned, and characters score lowest.
    """
    controls = [("<pad>", TokenType.CONTROL), ("<eos>", TokenType.CONTROL)]
    controls += [("<bos>", TokenType.CONTROL), ("<unk>", TokenType.UNKNOWN)]
    tokens = [(text, 0.0, kind) for text, kind in controls]
    tokens += [(f"<0x{byte:02X}>", 0.0, TokenType.BYTE) for byte in range(256)]
    tokens += [(piece, -1.0 - i, TokenType.NORMAL) for i, piece in enumerate(PIECES)]
    tokens[-1] = ("▁▁", 0.0, TokenType.USER_DEFINED)
    characters = "▁abcdefghijklmnopqrstuvwxyzé漢"
    tokens += [(c, -100.0 - i, TokenType.NORMAL) for i, c in enumerate(characters)]
    unused = range(vocab_size - len(tokens))
    return tokens + [(f"<unused{i}>", 0.0, TokenType.UNUSED) for i in unused]


def _add_sentencepiece(writer: GGUFWriter, vocab_size: int) -> None:
    texts, scores, kinds = zip(*sentencepiece_tokens(vocab_size), strict=True)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(texts)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(3)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
