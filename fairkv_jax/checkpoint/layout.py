"""Head order: the canonical names and shapes of a model's tensors.

Published checkpoints store projections as [out, in] matrices. The engine wants the heads as
axes, grouped by KV head, and the model width last everywhere (letters as in `shapes.py`):

    embed, unembed  [V, D]          layers.{l}.q, .o           [K, G, H, D]
    norm            [D]             layers.{l}.k, .v           [K, H, D]
    layers.{l}.attn_norm            layers.{l}.gate, .up       [F, D]
    layers.{l}.mlp_norm  [D]        layers.{l}.down            [F, D]

`o` and `down` are therefore the transposes of what is stored; `unembed` exists only where the
embedding is not tied.
"""

import numpy as np

from fairkv_jax.config import ModelConfig

LAYER_TENSORS = ("attn_norm", "q", "k", "v", "o", "mlp_norm", "gate", "up", "down")
_TRANSPOSED = ("o", "down")


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in head order, by canonical name."""
    K, G, H = config.num_kv_heads, config.group_size, config.head_dim
    D, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    layer = {
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
    shapes: dict[str, tuple[int, ...]] = {"embed": (V, D)}
    for index in range(config.num_layers):
        shapes |= {f"layers.{index}.{kind}": layer[kind] for kind in LAYER_TENSORS}
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
    """The [out, in] shape under which published checkpoints store a tensor."""
    if len(shape) == 1:
        return shape
    rows, columns = int(np.prod(shape[:-1])), shape[-1]
    return (columns, rows) if split_name(name)[0] in _TRANSPOSED else (rows, columns)


def to_head_order(name: str, stored: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Brings a stored [out, in] matrix into its shape in head order, contiguous."""
    if split_name(name)[0] in _TRANSPOSED:
        stored = stored.T
    return np.ascontiguousarray(stored.reshape(shape))
