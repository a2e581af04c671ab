"""Greedy decoding over a compressed cache in NumPy, recomputed from scratch at every token.

The prompt is a chain of segments, one or several, each of which is compressed at its own end. A
token sees its own segment up to itself. Of each segment before it, it sees under each KV head the
positions that this head kept; all keep their positions. Generated tokens follow the last segment.
That is one forward pass over prompt and output with a mask per layer and head: no cache, no pages.
"""

from collections.abc import Callable, Sequence

import numpy as np

from tests.oracle.forward import Llama, rms_norm, rope_table, rotate, silu, softmax

Kept = Sequence[Sequence[np.ndarray]]
"""For each layer and KV head the positions of a segment that it kept."""
Rounded = Callable[[np.ndarray], np.ndarray]
Segment = tuple[int, Kept]
"""The position behind a segment's last token, and what is kept of the segment."""


def generate(
    model: Llama,
    prompt: Sequence[int],
    segments: Sequence[Segment],
    num_tokens: int,
    rounded: Rounded = np.asarray,
) -> tuple[list[int], list[float]]:
    """The greedy tokens and their log-probabilities; `rounded` as in `forward`."""
    tokens, logprobs = [], []
    for _ in range(num_tokens):
        logits = forward(model, [*prompt, *tokens], segments, rounded)
        tokens.append(int(np.argmax(logits)))
        logprobs.append(float(np.log(softmax(logits)[tokens[-1]])))
    return tokens, logprobs


def forward(
    model: Llama,
    token_ids: Sequence[int],
    segments: Sequence[Segment],
    rounded: Rounded = np.asarray,
) -> np.ndarray:
    """Logits [V] of the last position; `rounded` is what the cache makes of keys and values."""
    T, N, K, H = len(token_ids), model.num_heads, model.num_kv_heads, model.head_dim
    weights, eps = model.weights, np.float32(model.rms_norm_eps)
    cos, sin = rope_table(T, H, model.rope_theta, np.float32)
    x = weights["embed_tokens"][np.asarray(token_ids)]
    for index in range(model.num_layers):
        layer = f"layers.{index}"

        def project(h: np.ndarray, name: str, heads: int, layer: str = layer) -> np.ndarray:
            return (h @ weights[f"{layer}.{name}"].T).reshape(T, heads, H).transpose(1, 0, 2)

        h = rms_norm(x, weights[f"{layer}.input_layernorm"], eps)
        q = rotate(project(h, "q_proj", N), cos, sin)
        k = rounded(rotate(project(h, "k_proj", K), cos, sin))
        v = rounded(project(h, "v_proj", K))
        attended = np.empty_like(q)
        for head in range(N):
            kv = head // (N // K)
            scores = q[head] @ k[kv].T / np.float32(np.sqrt(H))
            of_head = [(end, kept[index][kv]) for end, kept in segments]
            scores[~_sees(T, of_head)] = -np.inf
            attended[head] = softmax(scores) @ v[kv]
        x = x + attended.transpose(1, 0, 2).reshape(T, -1) @ weights[f"{layer}.o_proj"].T
        h = rms_norm(x, weights[f"{layer}.post_attention_layernorm"], eps)
        gate, up = (h @ weights[f"{layer}.{name}_proj"].T for name in ("gate", "up"))
        x = x + (silu(gate) * up) @ weights[f"{layer}.down_proj"].T
    last = rms_norm(x[-1], weights["norm"], eps)
    return weights.get("lm_head", weights["embed_tokens"]) @ last


def _sees(T: int, segments: Sequence[tuple[int, np.ndarray]]) -> np.ndarray:
    """[T, T]: which keys each query may attend to."""
    sees = np.tri(T, dtype=bool)
    start = 0
    for end, kept in segments:
        dropped = np.setdiff1d(np.arange(start, end), kept)
        sees[end:, dropped] = False
        start = end
    return sees
