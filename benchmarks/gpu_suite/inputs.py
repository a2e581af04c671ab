"""Random ragged caches for the measurements, with the lengths that real profiles give."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PAGE = 16


@dataclass(frozen=True)
class Sizes:
    """How much is measured: all of it on a GPU, little where only the suite's logic is tested."""

    interpret: bool
    """Kernels are interpreted on CPU: times mean nothing."""
    layers: int
    batches: tuple[int, ...]
    widths: tuple[int, ...]
    mean_tokens: int
    models: tuple[str, ...]
    devices: tuple[int, ...]
    emulated_layers: int | None
    """None: all that the model has."""
    emulated_batch: int
    repeats: int


FULL = Sizes(
    interpret=False,
    layers=32,
    batches=(8, 64),
    widths=(64, 128, 256),
    mean_tokens=1024,
    models=("llama-3-8b", "llama-3.3-70b", "mistral-small-24b"),
    devices=(4, 8),
    emulated_layers=None,
    emulated_batch=64,
    repeats=10,
)
TINY = Sizes(
    interpret=True,
    layers=2,
    batches=(2,),
    widths=(64,),
    mean_tokens=40,
    models=("smollm2-135m",),
    devices=(2,),
    emulated_layers=2,
    emulated_batch=3,
    repeats=1,
)


def ragged_cache(
    seed: int, lengths: np.ndarray, width: int, dtype: str, *, room: int = 0
) -> tuple[Any, Any, jax.Array]:
    """Keys and values for `lengths` [L, B, C], and their random page table [L, B, C, pages].

    `room` tokens more fit behind every length.
    """
    pages = -(-(lengths + room) // PAGE)
    rng = np.random.default_rng(seed)
    table = np.zeros((*lengths.shape, int(pages.max())), np.int32)
    used = np.arange(table.shape[-1]) < pages[..., None]
    table[used] = rng.permutation(int(pages.sum()))
    shape = (int(pages.sum()), PAGE, width)
    # Made on the device: random numbers by the gigabyte would take the host minutes.
    draw = jax.jit(lambda key: jax.random.normal(key, shape, dtype))
    keys = jax.random.split(jax.random.key(seed))
    return draw(keys[0]), draw(keys[1]), jnp.asarray(table)


def drawn_lengths(
    seed: int, layers: int, batch: int, heads: int, mean: int, imbalance: float
) -> np.ndarray:
    """[L, B, K] lengths of that mean; heads of a layer differ by `imbalance`, rows a little."""
    rng = np.random.default_rng(seed)
    if imbalance == 0:
        return np.full((layers, batch, heads), mean, np.int32)
    sigma = np.sqrt(np.log1p(imbalance**2))
    strength = rng.lognormal(0, sigma, (layers, 1, heads))
    strength = strength * rng.lognormal(0, 0.1, (layers, batch, heads))
    strength *= mean / strength.mean((1, 2), keepdims=True)
    return np.maximum(1, strength).astype(np.int32)
