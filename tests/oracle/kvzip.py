"""KVzip (Kim et al., 2025) in plain NumPy: tokens are scored while the model repeats the prompt.

Written from the definition. After the prefill the prompt is replayed, chunk by chunk, behind an
instruction to repeat it. A token's score is the largest attention that a replayed query of its
chunk pays to it. All heads of all layers then compete for one budget.

T: tokens of the prompt. R: tokens of one replay. sinks: the first tokens that are always kept.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tests.oracle.allocators import Positions, whole_model
from tests.oracle.forward import Layer, Llama, forward, softmax
from tests.oracle.scorers import NUM_SINKS, output_norms

CHUNK_TOKENS = 2048
REPEATED_TOKENS = 8
FIRST = "\n\nRepeat the previous context exactly."
LATER = "\n\nRepeat the part of the previous context exactly, starting with"


@dataclass(frozen=True)
class Replay:
    """One chunk of the prompt, and the tokens that are run behind the whole prompt for it."""

    start: int
    stop: int
    token_ids: list[int]


def replays(
    prompt: Sequence[int],
    encode: Callable[[str], list[int]],
    *,
    suffix: str = "\n",
    prefix_tokens: int = 0,
    chunk_tokens: int = CHUNK_TOKENS,
) -> list[Replay]:
    """Returns the replays of a prompt.

    `suffix` is what the chat template writes between a question and its answer, and `prefix_tokens`
    are those that it writes before the text; they are in no chunk. From the second chunk on, the
    instruction ends with the last 8 tokens of the chunk before.
    """
    ids, made = list(prompt), []
    for start in range(prefix_tokens, len(ids), chunk_tokens):
        stop = min(start + chunk_tokens, len(ids))
        if start == prefix_tokens:
            instruction = encode(FIRST)
        else:
            instruction = encode(LATER) + ids[start - REPEATED_TOKENS : start]
        made.append(Replay(start, stop, instruction + encode(suffix) + ids[start:stop]))
    return made


def chunk_scores(layer: Layer, T: int, start: int, stop: int, plus: bool) -> np.ndarray:
    """Returns the scores [K, stop - start] of one chunk in one layer.

    `layer` holds the prompt and the chunk's replay, T + R tokens. The softmax is over the sinks
    before the chunk, the chunk and the replay up to the query, although the replayed tokens
    themselves attended to the whole prompt. KVzip+ multiplies by |W_o v| / |h|, of the key's value
    and of the query's input.
    """
    N, tokens, H = layer.q.shape
    K = len(layer.k)
    R, sinks = tokens - T, min(NUM_SINKS, start)
    seen = np.r_[:sinks, start:stop, T:tokens]
    later = np.arange(R) > np.arange(R)[:, None]
    best = np.zeros((K, stop - start), layer.q.dtype)
    norms = output_norms(layer, order=2) if plus else None
    for head in range(N):
        kv = head // (N // K)
        logits = layer.q[head, T:] @ layer.k[kv, seen].T / layer.q.dtype.type(math.sqrt(H))
        logits[:, -R:][later] = -np.inf
        attention = softmax(logits)
        if norms is not None:
            lengths = np.linalg.norm(layer.h[T:], axis=1)
            attention = attention * norms[head, seen] / lengths[:, None]
        best[kv] = np.maximum(best[kv], attention[:, sinks : sinks + stop - start].max(axis=0))
    return best


def scores(
    model: Llama, prompt: Sequence[int], parts: Sequence[Replay], plus: bool = False
) -> np.ndarray:
    """Returns the scores of the prompt in all layers, [L, K, T].

    The sinks get +inf, tokens that are in no chunk 0.
    """
    T = len(prompt)
    result = np.zeros((model.num_layers, model.num_kv_heads, T), np.float32)
    for part in parts:
        whole = forward(model, [*prompt, *part.token_ids])
        for index, layer in enumerate(whole.layers):
            chunk = chunk_scores(layer, T, part.start, part.stop, plus)
            result[index, :, part.start : part.stop] = chunk
    result[..., :NUM_SINKS] = np.inf
    return result


def kept_positions(all_scores: np.ndarray, ratio: float) -> list[Positions]:
    """Removes int(L*K*T * ratio) of the pairs [L, K, T]."""
    return whole_model(all_scores, all_scores.size - int(all_scores.size * ratio))
