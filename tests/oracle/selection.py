"""Which prompt positions each KV head keeps, policy by policy, in plain NumPy.

Written from the definitions: SnapKV scores a key by the attention that the prompt's last queries
pay to it; Ada-SnapKV lets the heads of a layer compete for one common budget. Every ranking is
stable and descending, so that of equal scores the earlier position, then the lower head, wins.

T prompt tokens, n kept tokens a head on average, w = min(window, n) of them in the window.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from tests.oracle.forward import softmax

NUM_SINKS = 4


@dataclass(frozen=True)
class Options:
    """The policy's name and every number that it may use."""

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
        """n of a prompt of T tokens."""
        if self.policy == "full":
            return T
        if self.budget is not None:
            return min(self.budget, T)
        assert self.ratio is not None
        return max(1, int(T * (1 - self.ratio)))


def kept_positions(q: np.ndarray, k: np.ndarray, options: Options) -> list[np.ndarray]:
    """The positions, ascending, that each KV head of one layer keeps; q [N,T,H], k [K,T,H]."""
    K, T, _ = k.shape
    n = options.kept_tokens(T)
    if n >= T:
        return [np.arange(T)] * K
    if options.policy == "streaming_llm":
        sinks = min(NUM_SINKS, n)
        return [np.r_[:sinks, T - (n - sinks) : T]] * K
    w = min(options.window, n)
    scores = snapkv_scores(q, k, w, options)
    if options.policy == "snapkv":
        quotas = [n - w] * K
    elif options.policy == "ada_snapkv" and options.safeguard == "blend":
        quotas = blended_quotas(scores, n - w, options.alpha_safeguard)
    elif options.policy == "ada_snapkv" and options.safeguard == "reserve":
        return reserved_positions(scores, w, n, options.alpha_safeguard)
    else:
        raise ValueError(f"unknown policy {options.policy!r} or safeguard {options.safeguard!r}")
    window = np.arange(T - w, T)
    return [np.r_[top(scores[head], quotas[head]), window] for head in range(K)]


def snapkv_scores(q: np.ndarray, k: np.ndarray, w: int, options: Options) -> np.ndarray:
    """[K, T-w]: what the last w queries attend to before the window, pooled, one row a KV head."""
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
    """Each entry becomes the maximum of its surroundings, or their mean, zeros beyond the ends."""
    half = kernel // 2
    padding = {"max": -np.inf, "avg": 0.0}[kind]
    padded = np.pad(row, half, constant_values=padding)
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel)
    return windows.max(axis=1) if kind == "max" else windows.sum(axis=1) / row.dtype.type(kernel)


def ranking(scores: np.ndarray) -> np.ndarray:
    """Indices by falling score; equal scores in the order of their indices."""
    return np.argsort(-scores, kind="stable")


def top(scores: np.ndarray, count: int) -> np.ndarray:
    """The positions of the `count` highest scores, ascending."""
    return np.sort(ranking(scores)[:count])


def blended_quotas(scores: np.ndarray, c: int, alpha: float) -> list[int]:
    """Per head round((1-alpha)*f + floor(alpha*c)), f its share of the layer's top K*c scores."""
    K, width = scores.shape
    winners = ranking(scores.ravel())[: K * c]
    shares = np.bincount(winners // width, minlength=K)
    a = _exact(alpha)
    return [round((1 - a) * int(f) + math.floor(a * c)) for f in shares]


def reserved_positions(scores: np.ndarray, w: int, n: int, alpha: float) -> list[np.ndarray]:
    """Each head first keeps its own top max(1, floor(alpha*n)), the layer's top fill up to K*n.

    The window takes part, above every score.
    """
    K = scores.shape[0]
    everything = np.pad(scores, ((0, 0), (0, w)), constant_values=np.inf)
    T = everything.shape[1]
    chosen = np.zeros((K, T), bool)
    for head in range(K):
        chosen[head, ranking(everything[head])[: max(1, math.floor(_exact(alpha) * n))]] = True
    for index in ranking(everything.ravel()):
        if chosen.sum() == K * n:
            break
        chosen.flat[index] = True
    return [np.flatnonzero(row) for row in chosen]


def _exact(alpha: float) -> Fraction:
    """The decimal that was written: 0.29 * 100 is 29, in binary floats a little less."""
    return Fraction(repr(alpha))
