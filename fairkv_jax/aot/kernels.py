"""The decode kernels alone, for every shape that they are meant for: registers and spills."""

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
from fairkv_jax.pallas.ragged_decode import Pool, append_and_decode, device_of

DTYPES = ("bfloat16", "float16", "float32")
WIDTHS = (64, 96, 128, 256)
GROUPS = (1, 4, 8, 16)
POOL_BYTES = 6 << 30  # of keys: beyond 4 GiB offsets take 64 bits, and registers
PAGE_SIZE, MAX_PAGES = 16, 512
BATCH, SLOTS = 64, 2


def compile_all(backend: str, target: Target) -> Iterator[tuple[str, int, int, Report | str]]:
    """Type, head width and group with what compiling gave, or with why it is not taken."""
    for dtype, width, group in product(DTYPES, WIDTHS, GROUPS):
        try:
            lowered = lower_kernels(backend, target, group, width, dtype)
        except NotImplementedError as error:
            yield dtype, width, group, str(error)
        else:
            yield dtype, width, group, compile_and_report(lowered, target.architecture)


def lower_kernels(backend: str, target: Target, group: int, width: int, dtype: str) -> Lowered:
    """One layer's `append_and_decode`, its pool donated.

    Raises:
        NotImplementedError: the backend does not take this shape on this target.
    """
    mesh = target.mesh(1)
    device, placed = device_of(mesh), NamedSharding(mesh, PartitionSpec())

    def array(*shape: int, dtype: str = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placed)

    def step(pool: Pool, q: Array, k: Array, v: Array, table: Array, lengths: Array) -> Any:
        return append_and_decode(q, k, v, pool, table, lengths, backend=backend, device=device)

    num_pages = POOL_BYTES // (PAGE_SIZE * width * jnp.dtype(dtype).itemsize)
    pages, new = array(num_pages, PAGE_SIZE, width), array(BATCH, SLOTS, width)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(step, donate_argnums=0).lower(
            (pages, pages),
            array(BATCH, SLOTS, group, width),
            new,
            new,
            array(BATCH, SLOTS, MAX_PAGES, dtype="int32"),
            array(BATCH, SLOTS, dtype="int32"),
        )
