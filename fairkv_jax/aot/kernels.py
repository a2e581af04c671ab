"""Compiles the decode kernels alone, for all shapes that they support, and reports registers."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.stages import Lowered
from jaxtyping import Array

from fairkv_jax.aot.report import Report, compile_and_report
from fairkv_jax.aot.targets import Target
from fairkv_jax.config import page_dtype
from fairkv_jax.kv_cache_spec import INT8, SCALE_DTYPE
from fairkv_jax.pallas.ragged_decode import PageTable, Pool, append_and_decode, device_of

DTYPES = ("bfloat16", "float16", "float32")
HEAD_DIMS = (64, 96, 128, 256)
GROUPS = (1, 4, 8, 16)
POOL_BYTES = 6 << 30  # Of the keys. Beyond 4 GiB, offsets have 64 bits and need more registers.
PAGE_SIZE, MAX_PAGES = 16, 512
LAYERS, BATCH, SLOTS = 8, 64, 2


def compile_all(
    backend: str, target: Target, kv_cache_dtype: str = "auto"
) -> Iterator[tuple[str, int, int, Report | str]]:
    """Yields type, head dimension, group, and the report or the reason for missing support."""
    for dtype, head_dim, group in product(DTYPES, HEAD_DIMS, GROUPS):
        try:
            lowered = lower_kernels(backend, target, group, head_dim, dtype, kv_cache_dtype)
        except NotImplementedError as error:
            yield dtype, head_dim, group, str(error)
        else:
            yield dtype, head_dim, group, compile_and_report(lowered, target.architecture)


def lower_kernels(
    backend: str,
    target: Target,
    group: int,
    head_dim: int,
    dtype: str,
    kv_cache_dtype: str = "auto",
    pairs: int = BATCH * SLOTS,
) -> Lowered:
    """Lowers `append_and_decode` of one layer with that many (row, slot) pairs, its pool donated.

    Raises:
        NotImplementedError: The backend does not support this shape on this target.
    """
    mesh = target.mesh(1)
    device, placed = device_of(mesh), NamedSharding(mesh, PartitionSpec())

    def array(*shape: int, dtype: str = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placed)

    def step(pool: Pool, q: Array, k: Array, v: Array, *lists: Any) -> Any:
        return append_and_decode(q, k, v, pool, *lists, backend=backend, device=device)

    cached = page_dtype(kv_cache_dtype, dtype)
    num_pages = POOL_BYTES // (PAGE_SIZE * head_dim * jnp.dtype(cached).itemsize)
    pages = array(num_pages, PAGE_SIZE, head_dim, dtype=cached)
    scale = array(num_pages, PAGE_SIZE, dtype=SCALE_DTYPE)
    pool: Any = Pool(pages, pages, (scale, scale) if cached == INT8 else None)  # pyright: ignore[reportArgumentType]
    batch = pairs // SLOTS
    new = array(batch, 1, SLOTS, head_dim)
    entries: Any = array(LAYERS * pairs * MAX_PAGES, dtype="int32")
    per_pair: Any = array(LAYERS, batch, SLOTS, dtype="int32")
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(step, donate_argnums=0).lower(
            pool,
            array(batch, 1, SLOTS, group, head_dim),
            new,
            new,
            PageTable(entries, per_pair),
            per_pair,
            array(dtype="int32"),
        )
