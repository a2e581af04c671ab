"""Which prompt positions each KV head keeps, by method, in plain NumPy.

Written from the definitions. SnapKV scores a key by the attention that the prompt's last queries
pay to it. Ada-SnapKV lets the heads of a layer compete for one common budget. Every ranking is
stable and descending, so that among equal scores the earlier position, then the lower head, wins.

T: prompt tokens. n: a head's budget in tokens. w = min(window, n): those of its tokens that are the
prompt's last.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from tests.oracle.forward import softmax

NUM_SINKS = 4

Rows = np.ndarray | Sequence[np.ndarray]
"""One array of scores per head; their lengths may differ."""


@dataclass(frozen=True)
class Options:
    """The method's name and its parameters."""

    policy: str
    budget: int | None = None
    ratio: float | None = None
    window: int = 32
    pooling: str = "max"
    kernel: int = 7
    pool_first: bool = False
    safeguard: str = "blend"
    alpha_safeguard: float = 0.2

    def kept_tokens(self, T: int) -> int:
        """Returns n for a prompt of T tokens."""
        if self.policy == "full":
            return T
        if self.budget is not None:
            return min(self.budget, T)
        assert self.ratio is not None
        return max(1, int(T * (1 - self.ratio)))


def kept_positions(
    q: np.ndarray, k: np.ndarray, options: Options, budgets: Sequence[int] | None = None
) -> list[np.ndarray]:
    """Returns the positions, ascending, that each KV head of one layer keeps.

    q [N, T, H], k [K, T, H]. `budgets` gives one n per KV head in place of the options' own.
    """
    K, T, _ = k.shape
    n = [min(b, T) for b in budgets] if budgets else [options.kept_tokens(T)] * K
    if min(n) >= T:
        return [np.arange(T)] * K
    if options.policy == "streaming_llm":
        return [np.r_[: min(NUM_SINKS, b), T - max(b - NUM_SINKS, 0) : T] for b in n]
    w = [min(options.window, b) for b in n]
    G = len(q) // K
    scores = [
        snapkv_scores(q[head * G : (head + 1) * G], k[head : head + 1], w[head], options)[0]
        for head in range(K)
    ]
    c = [total - last for total, last in zip(n, w, strict=True)]
    if options.policy == "snapkv":
        quotas = c
    elif options.policy == "ada_snapkv" and options.safeguard == "blend":
        quotas = blended_quotas(scores, c, options.alpha_safeguard)
    elif options.policy == "ada_snapkv" and options.safeguard == "reserve":
        kept = reserved_positions(scores, w, n, options.alpha_safeguard)
        return [np.arange(T) if b >= T else row for b, row in zip(n, kept, strict=True)]
    else:
        raise ValueError(f"unknown policy {options.policy!r} or floor {options.safeguard!r}")
    return [
        np.arange(T)
        if n[head] >= T
        else np.r_[top(scores[head], quotas[head]), np.arange(T - w[head], T)]
        for head in range(K)
    ]


def snapkv_scores(q: np.ndarray, k: np.ndarray, w: int, options: Options) -> np.ndarray:
    """Returns the pooled attention of the last w queries to the keys before them, [K, T-w]."""
    (N, T, H), K = q.shape, k.shape[0]
    G = N // K
    future = np.arange(T) > np.arange(T - w, T)[:, None]
    rows = []
    for head in range(N):
        logits = q[head, T - w :] @ k[head // G].T / q.dtype.type(math.sqrt(H))
        logits[future] = -np.inf
        rows.append(softmax(logits)[:, : T - w].mean(axis=0))
    scores = np.stack(rows)

    def grouped(x: np.ndarray) -> np.ndarray:
        return x.reshape(K, G, -1).mean(axis=1)

    def pooled(x: np.ndarray) -> np.ndarray:
        return np.stack([pool(row, options.pooling, options.kernel) for row in x])

    return grouped(pooled(scores)) if options.pool_first else pooled(grouped(scores))


def pool(row: np.ndarray, kind: str, kernel: int) -> np.ndarray:
    """Returns the sliding maximum or mean; in the mean, zeros stand beyond the ends."""
    half = kernel // 2
    padding = {"max": -np.inf, "avg": 0.0}[kind]
    padded = np.pad(row, half, constant_values=padding)
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel)
    return windows.max(axis=1) if kind == "max" else windows.sum(axis=1) / row.dtype.type(kernel)


def ranking(scores: np.ndarray) -> np.ndarray:
    """Returns indices by descending score; equal scores in the order of their indices."""
    return np.argsort(-scores, kind="stable")


def top(scores: np.ndarray, count: int) -> np.ndarray:
    """Returns the positions of the `count` highest scores, ascending."""
    return np.sort(ranking(scores)[:count])


def blended_quotas(scores: Rows, c: int | Sequence[int], alpha: float) -> list[int]:
    """Returns round((1-alpha)*f + floor(alpha*c)) per head.

    `scores` has one row per head, `c` the budgets outside the window. f is the number of the
    layer's sum(c) best scores that belong to the head.
    """
    budgets: list[int] = np.broadcast_to(c, len(scores)).tolist()
    head_of_score = np.repeat(np.arange(len(scores)), [len(row) for row in scores])
    winners = ranking(np.concatenate(list(scores)))[: sum(budgets)]
    shares = np.bincount(head_of_score[winners], minlength=len(scores))
    a = _exact(alpha)
    return [
        round((1 - a) * int(f) + math.floor(a * own))
        for f, own in zip(shares, budgets, strict=True)
    ]


def reserved_positions(
    scores: Rows, w: int | Sequence[int], n: int | Sequence[int], alpha: float
) -> list[np.ndarray]:
    """Returns each head's own top max(1, floor(alpha*n)), and the layer's top up to sum(n).

    `scores` has one row per head, of the T - w positions before its window. The window takes part,
    above every score.
    """
    windows = np.broadcast_to(w, len(scores))
    budgets: list[int] = np.broadcast_to(n, len(scores)).tolist()
    everything = np.stack(
        [np.r_[row, np.full(size, np.inf)] for row, size in zip(scores, windows, strict=True)]
    )
    chosen = np.zeros(everything.shape, bool)
    for head, budget in enumerate(budgets):
        chosen[head, ranking(everything[head])[: max(1, exact_floor(alpha, budget))]] = True
    for index in ranking(everything.ravel()):
        if chosen.sum() == sum(budgets):
            break
        chosen.flat[index] = True
    return [np.flatnonzero(row) for row in chosen]


def exact_floor(alpha: float, tokens: int) -> int:
    """Returns floor(alpha * tokens), of the decimal alpha as it was written."""
    return math.floor(_exact(alpha) * tokens)


def _exact(alpha: float) -> Fraction:
    """Returns the decimal as it was written: 0.29 * 100 is 29, in binary floats a little less."""
    return Fraction(repr(alpha))
