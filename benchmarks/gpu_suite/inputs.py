"""Random ragged caches for the measurements, with lengths distributed as in real profiles."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fairkv_jax.pallas.ragged_decode import PageTable
from fairkv_jax.plan import SHAPES, ModelShape

PAGE = 16
BLOCK = 1 << 22
"""Random numbers that differ from each other."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of the measurements."""

    interpret: bool
    """Whether the kernels are interpreted on CPU, where their times are meaningless."""
    layers: int
    batches: tuple[int, ...]
    widths: tuple[int, ...]
    mean_tokens: int
    shapes: Mapping[str, ModelShape]
    """The models of the emulated decode steps by lower-case name."""
    devices: tuple[int, ...]
    points: tuple[tuple[int, int], ...]
    """Batch and mean cached tokens per head of the emulated decode steps."""
    equal_memory: bool
    """Whether the strategies are also compared at the batch that fits into the same memory."""
    dtype: str
    """Type of the weights and of the KV cache in the emulated decode steps."""
    on_cpu: bool
    """Whether the emulated devices are CPUs: costs are fitted, and CPU time is compared."""
    least_pages: int
    """Minimum pages of the emulated KV cache: with the same number, points share their programs."""
    profiles: Path | None
    """Folder of published head profiles; a model without one there gets a synthetic profile."""
    demo: tuple[int, int, int]
    """Rows of the batch, prompt tokens and new tokens of the demo model."""
    repeats: int
    tiles: int
    """Maximum number of tile candidates per backend and head dimension."""


FULL = Sizes(
    interpret=False,
    layers=32,
    batches=(64, 8),
    widths=(128, 64, 256),
    mean_tokens=1024,
    shapes={name: SHAPES[name] for name in ("llama-3.1-8b", "llama-3.3-70b", "mistral-small-24b")},
    devices=(8, 4),
    points=(
        (64, 4096),
        (64, 1024),
        (256, 1024),
        (64, 16384),
        (256, 4096),
        (16, 4096),
        (16, 16384),
        (16, 1024),
        (256, 16384),
    ),
    equal_memory=True,
    dtype="bfloat16",
    on_cpu=False,
    least_pages=0,
    profiles=None,
    demo=(32, 1024, 128),
    repeats=10,
    tiles=12,
)
"""On a GPU. The points come in the order of their importance, because time may run out."""
TINY = Sizes(
    interpret=True,
    layers=2,
    batches=(2,),
    widths=(64,),
    mean_tokens=40,
    shapes={"smollm2-135m": replace(SHAPES["smollm2-135m"], num_layers=2)},
    devices=(2,),
    points=((3, 40),),
    equal_memory=True,
    dtype="bfloat16",
    on_cpu=False,
    least_pages=0,
    profiles=None,
    demo=(2, 64, 4),
    repeats=1,
    tiles=2,
)
"""On a CPU that interprets the kernels, to test the suite's logic."""
SMALL = replace(
    FULL,
    shapes={"llama-3.1-8b": ModelShape(16, 2048, 32, 8, 64, 8192, 128256)},
    points=((8, 4096), (8, 1024), (16, 4096), (8, 2048)),
    equal_memory=False,
    dtype="float32",
    on_cpu=True,
    least_pages=200_000,
    demo=(4, 256, 32),
    repeats=5,
)
"""On a CPU, with real times: the widths and layers of Llama-3.2-1B, and Llama-3.1-8B's heads."""


@dataclass(frozen=True)
class CacheShape:
    """The pool and page table that hold each of several `lengths` [L, B, C], with one program."""

    num_pages: int
    max_pages: int
    """The most pages of one (layer, row, slot)."""

    @classmethod
    def of(cls, *lengths: np.ndarray, room: int = 0, least_pages: int = 0) -> "CacheShape":
        """With space for `room` tokens more behind every length."""
        pages = [-(-(each + room) // PAGE) for each in lengths]
        most = max(int(p.sum()) for p in pages)
        return cls(max(most, least_pages), max(int(p.max()) for p in pages))

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
    """Normal random numbers, drawn on the device; beyond `BLOCK` of them, the same ones again.

    The host would need minutes for gigabytes, and a CPU one for every billion of numbers.
    """
    block = min(BLOCK, math.prod(shape))

    def draw(key: jax.Array) -> jax.Array:
        return jnp.resize(scale * jax.random.normal(key, (block,), dtype), shape)

    return jax.jit(draw)(jax.random.key(seed, impl="rbg"))


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
