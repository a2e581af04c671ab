"""Head order: the canonical names and shapes of a model's tensors.

Published checkpoints store projections as [out, in] matrices. The engine wants the heads as
axes, grouped by KV head, and the model width last everywhere (letters as in `shapes.py`):

    embed, unembed  [V, D]          layers.{l}.q, .o           [K, G, H, D]
    norm            [D]             layers.{l}.k, .v           [K, H, D]
    layers.{l}.attn_norm            layers.{l}.gate, .up       [F, D]
    layers.{l}.mlp_norm  [D]        layers.{l}.down            [F, D]
    layers.{l}.q_bias  [K, G, H]    layers.{l}.k_bias, .v_bias [K, H]
    layers.{l}.q_norm, .k_norm      [H]

`o` and `down` are therefore the transposes of what is stored. Biases, norms of heads and
`unembed` exist only where the configuration says so.
"""

import math
from collections.abc import Callable
from functools import cache
from threading import Lock

import numpy as np

from fairkv_jax.checkpoint.base import LazyTensor
from fairkv_jax.config import ModelConfig

BLOCK_VALUES = 1 << 20
"""What is read at once: it stays in the processor's caches on its way to the devices."""

TRANSPOSED = ("o", "down")
_BIASES = ("q_bias", "k_bias", "v_bias")


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in head order, by canonical name."""
    K, G, H = config.num_kv_heads, config.group_size, config.head_dim
    D, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm": (D,),
        "q": (K, G, H, D),
        "k": (K, H, D),
        "v": (K, H, D),
        "o": (K, G, H, D),
        "mlp_norm": (D,),
        "gate": (F, D),
        "up": (F, D),
        "down": (F, D),
    }
    if config.qkv_bias:
        layer |= {"q_bias": (K, G, H), "k_bias": (K, H), "v_bias": (K, H)}
    if config.qk_norm:
        layer |= {"q_norm": (H,), "k_norm": (H,)}
    shapes: dict[str, tuple[int, ...]] = {"embed": (V, D)}
    for index in range(config.num_layers):
        shapes |= {f"layers.{index}.{kind}": shape for kind, shape in layer.items()}
    shapes["norm"] = (D,)
    if not config.tie_word_embeddings:
        shapes["unembed"] = (V, D)
    return shapes


def split_name(name: str) -> tuple[str, int | None]:
    """("layers.3.q") -> ("q", 3); a tensor outside the layers has the index None."""
    if not name.startswith("layers."):
        return name, None
    _, index, kind = name.split(".")
    return kind, int(index)


def stored_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The [out, in] shape under which published checkpoints store a tensor; biases are [out]."""
    if len(shape) == 1:
        return shape
    if split_name(name)[0] in _BIASES:
        return (math.prod(shape),)
    rows, columns = math.prod(shape[:-1]), shape[-1]
    return (columns, rows) if split_name(name)[0] in TRANSPOSED else (rows, columns)


def head_order(
    name: str, shape: tuple[int, ...], read_rows: Callable[[int, int], np.ndarray]
) -> LazyTensor:
    """A stored [out, in] matrix or [out] vector as a lazy tensor in head order.

    `read_rows(start, stop)` gives those rows as they are stored. Of a matrix that is stored
    transposed it is asked once, for all of them.
    """
    if len(shape) == 1:
        return LazyTensor(shape, shape[0], read_rows)
    kind = split_name(name)[0]
    if kind in TRANSPOSED:
        read_rows = _once(read_rows)
    # What is stored for each row of the leading axis: rows, or columns where it is transposed.
    each = math.prod(shape[1:] if kind in _BIASES else shape[1:-1])

    def read(start: int, stop: int) -> np.ndarray:
        if kind in TRANSPOSED:
            rows = read_rows(0, shape[-1])[:, start * each : stop * each].T
        else:
            rows = read_rows(start * each, stop * each)
        return rows.reshape(stop - start, *shape[1:])

    block = max(1, BLOCK_VALUES // math.prod(shape[1:]))
    return LazyTensor(shape, min(block, shape[0]), read)


def _once(read_rows: Callable[[int, int], np.ndarray]) -> Callable[[int, int], np.ndarray]:
    """The same, but what has been read is kept, also while several threads ask for it."""
    read_rows, lock = cache(read_rows), Lock()

    def read(start: int, stop: int) -> np.ndarray:
        with lock:
            return read_rows(start, stop)

    return read
