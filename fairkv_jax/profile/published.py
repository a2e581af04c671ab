"""Converts published head scores of DuoAttention and HeadKV into head profiles.

The number of tokens per head follows from the scores by each paper's method, at a given budget and
prompt length.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fairkv_jax.plan import Profile, find_shape


def read_table(path: str | Path) -> np.ndarray:
    """Reads a tab-separated table with a row per layer, as float64 [L, heads].

    Raises:
        ValueError: the file is empty or not rectangular, or a value is not a finite number.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines if line.strip()]
    try:
        values = [[float(value) for value in row] for row in rows]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return _rectangular(values, path)


def read_headkv_json(path: str | Path) -> np.ndarray:
    """Reads HeadKV's JSON format as float64 [L, N].

    The file is an object {"layer-head": score or list of scores}; lists are averaged.

    Raises:
        ValueError: the file has another format, or a head is missing.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        scores = {
            tuple(int(part) for part in name.split("-")): float(np.mean(value))
            for name, value in record.items()
        }
        layers, heads = (1 + max(key[axis] for key in scores) for axis in (0, 1))
        values = [[scores[layer, head] for head in range(heads)] for layer in range(layers)]
    except KeyError as error:
        raise ValueError(f"{path}: head {error} has no score") from None
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f'{path} is not an object of "layer-head": score entries ({error})'
        ) from None
    return _rectangular(values, path)


def from_duo_attention(
    scores: np.ndarray,
    *,
    prompt_tokens: int,
    model: str = "",
    quantile: float = 0.5,
    sinks: int = 128,
    recent: int = 256,
) -> Profile:
    """Makes a profile by DuoAttention (arXiv 2410.10819).

    Retrieval heads keep every token. Streaming heads keep the first and the most recent tokens.

    Args:
        scores: [L, K] per KV head; heads whose score is above the quantile are retrieval heads.
        quantile: the fraction of streaming heads, in [0, 1].
        sinks: number of first tokens that a streaming head keeps.
        recent: number of most recent tokens that a streaming head keeps.
    """
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile must be in [0, 1], got {quantile}")
    _check_lengths(prompt_tokens=prompt_tokens, recent=recent)
    if sinks < 0:
        raise ValueError(f"sinks must be at least 0, got {sinks}")
    # With a quantile of 0, every head is a retrieval head, including that with the lowest score.
    retrieval = (scores > np.quantile(scores, quantile)) | (quantile == 0)
    tokens = np.where(retrieval, prompt_tokens, min(sinks + recent, prompt_tokens))
    return Profile(
        model=model,
        policy="duo_attention",
        budget=None,
        tokens=tokens.astype(float).tolist(),
        prompt_tokens=float(prompt_tokens),
        source=f"DuoAttention scores, quantile {quantile}, sinks {sinks}, recent {recent}",
        shape=find_shape(model),
    )


def from_headkv(
    scores: np.ndarray,
    *,
    num_kv_heads: int,
    budget: int,
    prompt_tokens: int,
    model: str = "",
    window: int = 8,
    beta: float = 1.2,
) -> Profile:
    """Makes a profile by HeadKV (arXiv 2410.19258).

    Every head contributes 1 / beta of its budget, without the window, to a global pool and keeps
    the rest. The pool is distributed in proportion to the scores. Scores of the query heads of a
    group are averaged, because the group shares one cache. Tokens beyond the prompt's length are
    redistributed to the other heads.

    Args:
        scores: [L, N], at least 0, per query head.
        budget: mean tokens per head, including the window.
        beta: at least 1; a larger value makes the pool smaller.
    """
    _check_lengths(prompt_tokens=prompt_tokens, window=window, num_kv_heads=num_kv_heads)
    layers, query_heads = scores.shape
    if query_heads % num_kv_heads:
        raise ValueError(f"{query_heads} query heads do not divide over {num_kv_heads} KV heads")
    if budget <= window:
        raise ValueError(
            f"budget {budget} must be larger than the window {window}: raise the budget or lower "
            "the window"
        )
    if not beta >= 1:
        raise ValueError(f"beta must be at least 1, got {beta}")
    grouped = scores.reshape(layers, num_kv_heads, -1).mean(2)
    if (grouped < 0).any() or not grouped.any():
        raise ValueError("HeadKV scores must be at least 0, and at least one must be positive")
    spare = budget - window
    floor = spare - spare / beta
    pool = spare / beta * grouped.size
    tokens = window + floor + _deal(pool, grouped, prompt_tokens - window - floor)
    return Profile(
        model=model,
        policy="headkv",
        budget=budget,
        tokens=np.minimum(tokens, prompt_tokens).tolist(),
        prompt_tokens=float(prompt_tokens),
        source=f"HeadKV scores, window {window}, beta {beta}",
        shape=find_shape(model),
    )


def _deal(pool: float, scores: np.ndarray, most: float) -> np.ndarray:
    """Distributes the pool in proportion to the scores, at most `most` tokens per head.

    Tokens beyond `most` are redistributed to the other heads.
    """
    dealt = np.zeros_like(scores)
    open_ = scores > 0
    while pool > 1e-9 * scores.size and open_.any() and most > 0:
        dealt[open_] += pool * scores[open_] / scores[open_].sum()
        pool = float(np.maximum(dealt - most, 0).sum())
        dealt = np.minimum(dealt, most)
        open_ &= dealt < most
    return dealt


def _check_lengths(**lengths: int) -> None:
    for name, value in lengths.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _rectangular(values: Sequence[Sequence[float]], path: str | Path) -> np.ndarray:
    widths = {len(row) for row in values}
    if len(widths) != 1:
        raise ValueError(f"{path}: every layer must have the same number of heads, got {widths}")
    table = np.array(values)
    if not np.isfinite(table).all():
        layer, head = np.argwhere(~np.isfinite(table))[0]
        raise ValueError(f"{path}: the score of layer {layer}, head {head} is not finite")
    return table
