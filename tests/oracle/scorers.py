"""How a layer's tokens are scored, by method, in plain NumPy.

Written from the definitions. All functions return [K, T] for the K KV heads of a layer and the T
tokens of a prompt; a larger score is more important, and +inf marks a token that every head keeps.

H: head width. G: query heads of one KV head. D: model width.
"""

import math

import numpy as np

from tests.oracle.forward import Layer, softmax

NUM_SINKS = 4
CRITICAL_EPSILON = 1e-4


def expected_attention(
    layer: Layer,
    epsilon: float = 1e-2,
    num_future: int = 512,
    use_norms: bool = True,
    num_tokens: int | None = None,
) -> np.ndarray:
    """Returns the attention that the next `num_future` queries are expected to pay to each key.

    Devoto et al., 2025. The queries before RoPE are taken as normally distributed, with the mean
    and covariance of the prompt's queries after the sinks. A future query is such a query turned by
    RoPE, whose turning is replaced by its mean over the positions T to T + num_future - 1. If x is
    normal with mean mu and covariance S, then E[exp(x.k / sqrt(H))] = exp(mu.k / sqrt(H) +
    k'Sk / (2H)). Those values are divided by their sum over the keys after the sinks, averaged over
    the group, and multiplied, `epsilon` added, by the length of the token's value.

    Where some tokens have been dropped, `num_tokens` is what T would be with them.
    """
    K, T, H = layer.k.shape
    G = len(layer.q) // K
    k, v = layer.k[:, NUM_SINKS:], layer.v[:, NUM_SINKS:]
    future = (num_tokens or T) + np.arange(num_future)
    turn = mean_rotation(layer.frequencies, future).astype(k.dtype)
    scores = np.full((K, T), np.inf, k.dtype)
    for head in range(K):
        total = np.zeros(T - NUM_SINKS, k.dtype)
        for query_head in range(head * G, (head + 1) * G):
            queries = layer.q_unrotated[query_head, NUM_SINKS:]
            mean = queries.mean(axis=0)
            covariance = (queries - mean).T @ (queries - mean) / k.dtype.type(len(queries))
            mean, covariance = turn @ mean, turn @ covariance @ turn.T
            logits = k[head] @ mean / k.dtype.type(math.sqrt(H))
            logits = logits + ((k[head] @ covariance) * k[head]).sum(axis=1) / k.dtype.type(2 * H)
            total = total + softmax(logits)
        mean_score = total / k.dtype.type(G)
        if use_norms:
            mean_score = (mean_score + k.dtype.type(epsilon)) * np.linalg.norm(v[head], axis=1)
        scores[head, NUM_SINKS:] = mean_score
    return scores


def mean_rotation(frequencies: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Returns the mean over positions of RoPE's matrix [H, H], which turns rows i and i + H/2."""
    half = len(frequencies)
    matrix = np.zeros((2 * half, 2 * half))
    for i, frequency in enumerate(frequencies):
        cos, sin = np.cos(positions * frequency).mean(), np.sin(positions * frequency).mean()
        matrix[i, i] = matrix[i + half, i + half] = cos
        matrix[i, i + half], matrix[i + half, i] = -sin, sin
    return matrix


def keydiff(layer: Layer) -> np.ndarray:
    """Returns minus the cosine between each key and the mean of the head's normalised keys.

    Park et al., 2025. Keys that differ from the others are kept.
    """
    directions = layer.k / np.linalg.norm(layer.k, axis=-1, keepdims=True)
    anchors = directions.mean(axis=1)
    anchors = anchors / np.linalg.norm(anchors, axis=-1, keepdims=True)
    return -np.stack([head @ anchor for head, anchor in zip(directions, anchors, strict=True)])


def neighbours(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the scores of the token before each token, and of the one after it."""
    padded = np.pad(scores, [(0, 0), (1, 1)], constant_values=-np.inf)
    return padded[:, :-2], padded[:, 2:]


def knorm(layer: Layer) -> np.ndarray:
    """Returns minus the length of each key (Devoto et al., 2024): short keys are kept."""
    return -np.linalg.norm(layer.k, axis=-1)


def tova(layer: Layer) -> np.ndarray:
    """Returns the last query's attention, averaged over all query heads (Oren et al., 2024).

    All KV heads have the same scores; the last token is kept.
    """
    K, T, H = layer.k.shape
    G = len(layer.q) // K
    rows = [
        softmax(layer.k[head // G] @ query[-1] / query.dtype.type(math.sqrt(H)))
        for head, query in enumerate(layer.q)
    ]
    scores = np.mean(rows, axis=0)
    scores[T - 1] = np.inf
    return np.tile(scores, (K, 1))


def output_norms(layer: Layer, order: int = 1) -> np.ndarray:
    """Returns |W_o v| of every token for each query head, [N, T].

    `order` 1 sums absolute values, 2 is the Euclidean norm.
    """
    G = len(layer.q) // len(layer.v)
    return np.stack(
        [
            np.linalg.norm(layer.v[head // G] @ matrix, ord=order, axis=1)
            for head, matrix in enumerate(layer.w_o)
        ]
    )


def critical(layer: Layer, scores: np.ndarray) -> np.ndarray:
    """Returns CriticalKV's second ranking of these scores (Feng et al., 2025).

    (score + 1e-4) times the mean of |W_o v|_1 over the group. It bounds how much the output of the
    attention block changes when the token is removed.
    """
    K = len(layer.v)
    norms = output_norms(layer).reshape(K, -1, scores.shape[1]).mean(axis=1)
    return (scores + scores.dtype.type(CRITICAL_EPSILON)) * norms
