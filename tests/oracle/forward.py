"""The forward pass of Llama and its relatives in NumPy, for a whole sequence at once.

Written from the formulas, with the head order and the RoPE convention in which Llama models are
published: projections are [out, in], query head n attends to KV head n // G, RoPE rotates the
halves of a head (row i with row i + H/2). The weights show what else a model has: biases of
queries, keys and values, norms of query and key heads. Gemma's norms, gate and embeddings differ by
fields of the model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize

QUERY_CHUNK = 256
"""Queries whose scores exist at once: [N, chunk, T] of float32."""

_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "q_proj",
    "attn_k": "k_proj",
    "attn_v": "v_proj",
    "attn_q_norm": "q_norm",
    "attn_k_norm": "k_norm",
    "attn_output": "o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "gate_proj",
    "ffn_up": "up_proj",
    "ffn_down": "down_proj",
}


def silu(x: np.ndarray) -> np.ndarray:
    """x * sigmoid(x), without overflow for very negative x."""
    return x * np.exp(np.minimum(x, 0)) / (1 + np.exp(-np.abs(x)))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    """Hendrycks and Gimpel (2016): 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))."""
    inner = x.dtype.type(np.sqrt(2 / np.pi)) * (x + x.dtype.type(0.044715) * x * x * x)
    return x.dtype.type(0.5) * x * (1 + np.tanh(inner))


@dataclass(frozen=True)
class Llama:
    """Published-layout weights by name ("embed_tokens", "layers.0.q_proj", ...) and sizes.

    A bias of "q_proj" is "q_proj.bias".
    """

    weights: dict[str, np.ndarray]
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float
    rope_divisors: np.ndarray | None = None
    """[H/2], divisors of the rotary frequencies of a model that was scaled to longer contexts."""
    activation: Callable[[np.ndarray], np.ndarray] = silu
    """The activation of the MLP's gate."""
    norm_offset: float = 0.0
    """Added to the weights of norms: 1 in Gemma."""
    embedding_scale: float = 1.0
    """The factor of embeddings: sqrt(D) in Gemma."""


@dataclass(frozen=True)
class Layer:
    """What one attention block computes of a sequence, and the weights that read it.

    T: the tokens of the sequence.
    """

    q: np.ndarray
    """[N, T, H], after RoPE."""
    k: np.ndarray
    """[K, T, H], after RoPE."""
    v: np.ndarray
    """[K, T, H]"""
    q_unrotated: np.ndarray
    """[N, T, H], before RoPE, and after the norms of query heads if the model has them."""
    h: np.ndarray
    """[T, D], the block's input after its norm."""
    w_o: np.ndarray
    """[N, H, D], the output projection of each query head."""
    frequencies: np.ndarray
    """[H/2], radians per position by which RoPE turns each pair of dimensions."""


@dataclass(frozen=True)
class Forward:
    """What one pass computes."""

    logits: np.ndarray
    """[V], of the last position."""
    layers: list[Layer]

    @property
    def q(self) -> list[np.ndarray]:
        """Queries [N, T, H] of each layer, after RoPE."""
        return [layer.q for layer in self.layers]

    @property
    def k(self) -> list[np.ndarray]:
        """Keys [K, T, H] of each layer, after RoPE."""
        return [layer.k for layer in self.layers]


def read_llama(path: Path) -> Llama:
    """Reads a GGUF file, dequantised to float32, with q and k rows in published order."""
    reader = GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()

    def meta(key: str):
        return reader.fields[f"{architecture}.{key}"].contents()

    num_heads, num_kv_heads = meta("attention.head_count"), meta("attention.head_count_kv")
    weights, divisors = {}, None
    for tensor in reader.tensors:
        value = np.array(dequantize(tensor.data, tensor.tensor_type), np.float32)
        parts = tensor.name.split(".")
        if parts[0] == "rope_freqs":
            divisors = value
        elif parts[0] == "blk":
            if parts[2] in ("attn_q", "attn_k") and architecture == "llama":
                value = _deinterleave(value, num_heads if parts[2] == "attn_q" else num_kv_heads)
            bias = ".bias" if parts[3] == "bias" else ""
            weights[f"layers.{parts[1]}.{_NAMES[parts[2]]}{bias}"] = value
        else:
            names = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}
            weights[names[parts[0]]] = value
    gemma = {}
    if architecture == "gemma":
        # Converters add the 1 to the weights of norms.
        norms = {name: value - 1 for name, value in weights.items() if name.endswith("norm")}
        weights |= norms
        scale = np.sqrt(meta("embedding_length"))
        gemma = {"activation": gelu_tanh, "norm_offset": 1.0, "embedding_scale": scale}
    return Llama(
        weights=weights,
        num_layers=meta("block_count"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=weights["layers.0.q_proj"].shape[0] // num_heads,
        rope_theta=meta("rope.freq_base"),
        rms_norm_eps=meta("attention.layer_norm_rms_epsilon"),
        rope_divisors=divisors,
        **gemma,
    )


def _deinterleave(matrix: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp stores rows 0, H/2, 1, H/2+1, ... of each head: even ones first, then odd ones."""
    per_head = np.split(matrix, heads)
    return np.concatenate([half for head in per_head for half in (head[0::2], head[1::2])])


def forward(model: Llama, token_ids: Sequence[int], dtype: type = np.float32) -> Forward:
    """Runs the model on a sequence, all arithmetic in `dtype`."""

    def weight(name: str) -> np.ndarray:
        return model.weights[name].astype(dtype, copy=False)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return rms_norm(x, dtype(model.norm_offset) + weight(name), eps)

    N, K, T = model.num_heads, model.num_kv_heads, len(token_ids)
    frequencies = rope_frequencies(model.head_dim, model.rope_theta, model.rope_divisors)
    cos, sin = rope_table(T, model.head_dim, model.rope_theta, dtype, model.rope_divisors)
    eps = dtype(model.rms_norm_eps)
    x = weight("embed_tokens")[np.asarray(token_ids)] * dtype(model.embedding_scale)
    layers = []
    for index in range(model.num_layers):
        layer = f"layers.{index}"
        h = norm(x, f"{layer}.input_layernorm")
        q, k, v = (h @ weight(f"{layer}.{name}_proj").T for name in "qkv")
        if f"{layer}.q_proj.bias" in model.weights:
            q = q + weight(f"{layer}.q_proj.bias")
            k = k + weight(f"{layer}.k_proj.bias")
            v = v + weight(f"{layer}.v_proj.bias")
        q, k, v = _split_heads(q, N), _split_heads(k, K), _split_heads(v, K)
        if f"{layer}.q_norm" in model.weights:
            q = norm(q, f"{layer}.q_norm")
            k = norm(k, f"{layer}.k_norm")
        unrotated, x_normed = q, h
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        attended = attention(q, k, v).transpose(1, 0, 2).reshape(T, -1)
        x = x + attended @ weight(f"{layer}.o_proj").T
        h = norm(x, f"{layer}.post_attention_layernorm")
        gate, up = h @ weight(f"{layer}.gate_proj").T, h @ weight(f"{layer}.up_proj").T
        x = x + (model.activation(gate) * up) @ weight(f"{layer}.down_proj").T
        w_o = weight(f"{layer}.o_proj").T.reshape(N, model.head_dim, -1)
        layers.append(Layer(q, k, v, unrotated, x_normed, w_o, frequencies))
    lm_head = weight("lm_head" if "lm_head" in model.weights else "embed_tokens")
    return Forward(lm_head @ norm(x[-1], "norm"), layers)


def _split_heads(x: np.ndarray, heads: int) -> np.ndarray:
    """[T, heads*H] -> [heads, T, H]"""
    return x.reshape(x.shape[0], heads, -1).transpose(1, 0, 2)


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: np.floating) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps), over the last axis, times the weight."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def rope_frequencies(H: int, theta: float, divisors: np.ndarray | None = None) -> np.ndarray:
    """Radians per position of the H/2 pairs, theta^(-2i/H) / divisor, in float64."""
    frequencies = theta ** (-2 * np.arange(H // 2, dtype=np.float64) / H)
    return frequencies if divisors is None else frequencies / divisors


def rope_table(
    T: int, H: int, theta: float, dtype: type, divisors: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin [T, H/2] of position * theta^(-2i/H) / divisor; angles exact to float64."""
    angles = np.arange(T, dtype=np.float64)[:, None] * rope_frequencies(H, theta, divisors)
    return np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)


def llama3_divisors(H: int, theta: float, scaling: Mapping[str, float]) -> np.ndarray:
    """Llama 3.1's stretching, pair by pair, with the names of config.json; float32 [H/2]."""
    context = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    divisors = []
    for i in range(H // 2):
        wavelength = 2 * np.pi * theta ** (2 * i / H)
        if wavelength < context / high:
            divisors.append(1.0)
        elif wavelength > context / low:
            divisors.append(scaling["factor"])
        else:
            smooth = (context / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(divisors, np.float32)


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Turns each pair (i, i + H/2) of [heads, T, H] by its angle."""
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def softmax(x: np.ndarray) -> np.ndarray:
    """exp(x) / sum(exp(x)) over the last axis; -inf gives 0."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Causal attention: [N, T, H] over [K, T, H] -> [N, T, H], scaled by 1/sqrt(H)."""
    (N, T, H), K = q.shape, k.shape[0]
    out = np.empty_like(q)
    for start in range(0, T, QUERY_CHUNK):
        stop = min(start + QUERY_CHUNK, T)
        later = np.arange(stop) > np.arange(start, stop)[:, None]
        for head in range(N):
            kv = head // (N // K)
            scores = q[head, start:stop] @ k[kv, :stop].T / q.dtype.type(np.sqrt(H))
            scores[later] = -np.inf
            out[head, start:stop] = softmax(scores) @ v[kv, :stop]
    return out
