"""Reads published files about heads, and converts them into head profiles.

DuoAttention and HeadKV publish scores: the number of tokens per head follows from them by each
paper's method, at a given budget and prompt length. Retention profiles count the tokens themselves.
"""

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fairkv_jax.plan import ModelShape, Profile, find_shape


def guess_format(path: str | Path, shape: ModelShape | None = None) -> str:
    """Returns "duo_attention", "headkv" or "retention", whichever a file can only be.

    Both papers publish tables of scores. DuoAttention's have a column per KV head and may contain
    negative scores, HeadKV's have a column per query head and cannot.

    Args:
        shape: the model's sizes, if they are known.

    Raises:
        ValueError: the file may have several formats, or none that is known.
    """
    suffix = Path(path).suffix
    if suffix == ".npz":
        return "retention"
    if suffix == ".json":
        return "headkv"
    table = read_table(path)
    if (table < 0).any():
        return "duo_attention"
    if shape is not None and shape.num_heads != shape.num_kv_heads:
        by_heads = {shape.num_kv_heads: "duo_attention", shape.num_heads: "headkv"}
        if table.shape[1] in by_heads:
            return by_heads[table.shape[1]]
    raise ValueError(
        f"{path} may be a table of DuoAttention or of HeadKV: say which by --format, or name a "
        "known model by --model"
    )


def read_retention(path: str | Path) -> np.ndarray:
    """Reads the kept tokens of prompts from an .npz file, as float64 [prompts, L, K].

    The file holds `kept` [prompts, L, K], or `raw_kept` [1, prompts, L, K] as Tangram
    (arXiv 2606.06302) writes it.

    Raises:
        ValueError: the file has another format.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("it is a single array")
            arrays = {name: file[name] for name in ("kept", "raw_kept") if name in file.files}
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not an .npz file of arrays: {error}") from None
    if "kept" in arrays:
        kept = arrays["kept"]
    elif "raw_kept" in arrays:
        kept = arrays["raw_kept"]
        if len(kept) != 1:
            raise ValueError(f"{path}: raw_kept must be [1, prompts, L, K], got {kept.shape}")
        kept = kept[0]
    else:
        raise ValueError(f"{path} holds neither kept nor raw_kept")
    if kept.ndim != 3 or not kept.size or not np.issubdtype(kept.dtype, np.number):
        raise ValueError(
            f"{path}: kept tokens must be numbers [prompts, layers, KV heads], got "
            f"{kept.dtype} {list(kept.shape)}"
        )
    return kept.astype(np.float64)


def from_retention(
    kept: np.ndarray,
    *,
    model: str = "",
    policy: str = "retention",
    prompt_tokens: int | None = None,
    source: str = "",
) -> Profile:
    """Makes a profile of the kept tokens [prompts, L, K] of prompts; its budget is their mean.

    Args:
        policy: the compression policy that kept them.
        prompt_tokens: mean length of the prompts, if it is known.
    """
    shape = find_shape(model)
    return Profile.from_samples(
        kept,
        model=model,
        policy=policy,
        budget=max(1, round(kept.mean())),
        prompt_tokens=None if prompt_tokens is None else float(prompt_tokens),
        source=source,
        shape=shape,
    )


def read_table(path: str | Path) -> np.ndarray:
    """Reads a tab-separated table with a row per layer, as float64 [L, heads].

    >>> import pathlib, tempfile
    >>> from fairkv_jax.profile import read_table
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "scores.tsv")
    ...     _ = path.write_text("0.9\\t0.1\\n0.2\\t0.7\\n")
    ...     read_table(path).tolist()
    [[0.9, 0.1], [0.2, 0.7]]

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

    >>> import json, pathlib, tempfile
    >>> from fairkv_jax.profile import read_headkv_json
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "scores.json")
    ...     _ = path.write_text(json.dumps({"0-0": [0.25, 0.75], "0-1": 0.125}))
    ...     read_headkv_json(path).tolist()
    [[0.5, 0.125]]

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

    >>> import numpy as np
    >>> from fairkv_jax.profile import from_duo_attention
    >>> from_duo_attention(np.array([[0.9, 0.1], [0.2, 0.7]]), prompt_tokens=4096).tokens
    ((4096.0, 384.0), (384.0, 4096.0))

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
    policy: str = "headkv",
    window: int = 8,
    beta: float = 1.2,
) -> Profile:
    """Makes a profile by HeadKV (arXiv 2410.19258).

    Every head contributes 1 / beta of its budget, without the window, to a global pool and keeps
    the rest. The pool is distributed in proportion to the scores. Scores of the query heads of a
    group are averaged, because the group shares one cache. Tokens beyond the prompt's length are
    redistributed to the other heads.

    >>> import numpy as np
    >>> from fairkv_jax.profile import from_headkv
    >>> scores = np.array([[0.3, 0.1, 0.0, 0.0], [0.2, 0.2, 0.1, 0.1]])  # 4 query heads
    >>> from_headkv(scores, num_kv_heads=2, budget=108, prompt_tokens=4096).array.round().tolist()
    [[158.0, 25.0], [158.0, 91.0]]

    Args:
        scores: [L, N], at least 0, per query head.
        budget: mean tokens per head, including the window.
        policy: the name of the compression policy that the profile carries.
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
        policy=policy,
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
