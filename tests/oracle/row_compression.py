"""Which of a row's cached tokens each head keeps when it is compressed while it decodes, in NumPy.

The heads hold different numbers of tokens. A head's scores are those of a prompt that consists of
its cached keys; the queries are the row's last ones, and positions are those of the whole text.
"""

from collections.abc import Sequence

import numpy as np

from tests.oracle import scorers
from tests.oracle.forward import Layer
from tests.oracle.selection import Options, blended_quotas, snapkv_scores, top

PROTECTED = 128


def kept(
    policy: str,
    heads: Sequence[tuple[np.ndarray, np.ndarray]],
    queries: Sequence[np.ndarray],
    queries_unrotated: Sequence[np.ndarray],
    frequencies: np.ndarray,
    num_tokens: int,
    budgets: Sequence[int],
    fixed_lengths: Sequence[int],
    options: Options,
) -> list[np.ndarray]:
    """Returns indices into each head's cached tokens, ascending.

    Args:
        heads: keys and values [n, H] of each KV head of a layer.
        queries: per KV head the last queries [G, w, H].
        num_tokens: tokens of prompt and output so far.
        fixed_lengths: the first tokens of each head, which are kept.
    """
    lengths = [len(k) for k, _ in heads]
    if sum(lengths) <= sum(budgets):
        return [np.arange(length) for length in lengths]
    rows = []
    for (k, v), q, unrotated, fixed in zip(
        heads, queries, queries_unrotated, fixed_lengths, strict=True
    ):
        row = _scores(policy, k, v, q, unrotated, frequencies, num_tokens, options)
        row[:fixed] = row[max(len(k) - PROTECTED, 0) :] = np.inf
        rows.append(row)
    if policy in ("snapkv", "keydiff"):
        return [top(row, budget) for row, budget in zip(rows, budgets, strict=True)]
    free = [np.flatnonzero(np.isfinite(row)) for row in rows]
    rest = [
        budget - (len(row) - len(own)) for budget, row, own in zip(budgets, rows, free, strict=True)
    ]
    candidates = [row[own] for row, own in zip(rows, free, strict=True)]
    quotas = blended_quotas(candidates, rest, options.alpha_safeguard)
    return [
        np.sort(np.r_[np.flatnonzero(np.isinf(row)), own[top(row[own], quota)]])
        for row, own, quota in zip(rows, free, quotas, strict=True)
    ]


def _scores(
    policy: str,
    k: np.ndarray,
    v: np.ndarray,
    q: np.ndarray,
    unrotated: np.ndarray,
    frequencies: np.ndarray,
    num_tokens: int,
    options: Options,
) -> np.ndarray:
    """Returns the scores [n] of one head's tokens."""
    if policy == "keydiff":
        return scorers.keydiff(_layer(k, v, q, unrotated, frequencies))[0]
    if policy == "expected_attention":
        sinks = np.zeros((len(q), scorers.NUM_SINKS, k.shape[1]), k.dtype)  # they do not count
        layer = _layer(k, v, q, np.concatenate([sinks, unrotated], 1), frequencies)
        return scorers.expected_attention(layer, num_tokens=num_tokens)[0]
    window = q.shape[1]
    before = np.zeros((len(q), len(k) - window, k.shape[1]), k.dtype)  # they are not read
    row = snapkv_scores(np.concatenate([before, q], 1), k[None], window, options)[0]
    return np.r_[row, np.full(window, np.inf)]


def _layer(
    k: np.ndarray, v: np.ndarray, q: np.ndarray, unrotated: np.ndarray, frequencies: np.ndarray
) -> Layer:
    nothing = np.zeros(0)
    return Layer(q, k[None], v[None], unrotated, nothing, nothing, frequencies)
