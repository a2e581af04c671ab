"""Random ragged caches for the measurements, with lengths distributed as in real profiles."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fairkv_jax.pallas.ragged_decode import PageTable

PAGE = 16


@dataclass(frozen=True)
class Sizes:
    """The sizes of the measurements: full on a GPU, tiny where only the suite's logic is tested."""

    interpret: bool
    """Whether the kernels are interpreted on CPU, where their times are meaningless."""
    layers: int
    batches: tuple[int, ...]
    widths: tuple[int, ...]
    mean_tokens: int
    models: tuple[str, ...]
    devices: tuple[int, ...]
    emulated_layers: int | None
    """None: all layers of the model."""
    emulated_batch: int
    repeats: int
    tiles: int
    """Maximum number of tile candidates per backend and head dimension."""


FULL = Sizes(
    interpret=False,
    layers=32,
    batches=(64, 8),
    widths=(128, 64, 256),
    mean_tokens=1024,
    models=("llama-3-8b", "llama-3.3-70b", "mistral-small-24b"),
    devices=(4, 8),
    emulated_layers=None,
    emulated_batch=64,
    repeats=10,
    tiles=12,
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
    tiles=2,
)


@dataclass(frozen=True)
class CacheShape:
    """The pool and page table that hold each of several `lengths` [L, B, C], with one program."""

    num_pages: int
    max_pages: int
    """The most pages of one (layer, row, slot)."""

    @classmethod
    def of(cls, *lengths: np.ndarray, room: int = 0) -> "CacheShape":
        """With space for `room` tokens more behind every length."""
        pages = [-(-(each + room) // PAGE) for each in lengths]
        return cls(max(int(p.sum()) for p in pages), max(int(p.max()) for p in pages))

    def pages(self, width: int, dtype: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.num_pages, PAGE, width), dtype)

    def table(self, lengths: np.ndarray) -> PageTable:
        """The shapes of the page table of `lengths`."""
        starts: Any = jax.ShapeDtypeStruct(lengths.shape, jnp.int32)
        pages: Any = jax.ShapeDtypeStruct((self.num_pages,), jnp.int32)
        return PageTable(pages, starts)


def page_table(seed: int, lengths: np.ndarray, shape: CacheShape, *, room: int = 0) -> PageTable:
    """Random pages for every length [L, B, C], none of them shared."""
    counts = -(-(lengths + room) // PAGE).reshape(-1)
    starts = (np.cumsum(counts) - counts).reshape(lengths.shape)
    pages = np.random.default_rng(seed).permutation(shape.num_pages)
    return PageTable(jnp.asarray(pages, jnp.int32), jnp.asarray(starts, jnp.int32))


def drawn(seed: int, shape: tuple[int, ...], dtype: str, scale: float = 1.0) -> jax.Array:
    """Normal random numbers, drawn on the device: the host would need minutes for gigabytes."""
    key = jax.random.key(seed, impl="rbg")
    return jax.jit(lambda key: scale * jax.random.normal(key, shape, dtype))(key)


def drawn_lengths(
    seed: int, layers: int, batch: int, heads: int, mean: int, imbalance: float
) -> np.ndarray:
    """Lengths [L, B, K] with that mean, whose heads differ by `imbalance` and whose rows little."""
    rng = np.random.default_rng(seed)
    if imbalance == 0:
        return np.full((layers, batch, heads), mean, np.int32)
    sigma = np.sqrt(np.log1p(imbalance**2))
    strength = rng.lognormal(0, sigma, (layers, 1, heads))
    strength = strength * rng.lognormal(0, 0.1, (layers, batch, heads))
    strength *= mean / strength.mean((1, 2), keepdims=True)
    return np.maximum(1, strength).astype(np.int32)
