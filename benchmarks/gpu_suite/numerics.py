"""Compares every backend with float64 NumPy on new random inputs; unused places hold NaN."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Lowered

from benchmarks.gpu_suite.inputs import PAGE, Sizes
from benchmarks.gpu_suite.programs import compile_all, said
from fairkv_jax.pallas.ragged_decode import BACKENDS, Device, PageTable, ragged_decode

LIMITS = {"float32": 1e-5, "float16": 3e-3, "bfloat16": 2e-2}
MAX_PAGES = 9


def measure(sizes: Sizes, device: Device) -> Iterator[dict[str, Any]]:
    """Yields |out - exact| / |exact| per type, head dimension and backend."""
    seed = int.from_bytes(np.random.default_rng().bytes(4))
    for dtype, limit in LIMITS.items():
        cases = {width: _case(seed, width, dtype) for width in sizes.widths}
        compiled = compile_all(
            {
                (width, backend): partial(_lower, case, dtype, backend, device)
                for width, case in cases.items()
                for backend in BACKENDS[1:]
            }
        )
        for (width, backend), program in compiled.items():
            record = {"backend": backend, "dtype": dtype, "width": width, "seed": seed}
            record["limit"] = limit
            if isinstance(program, NotImplementedError):
                yield record | {"skipped": str(program)}
            elif isinstance(program, Exception):
                yield record | {"passed": False, "failed": said(program)}
            else:
                yield record | _compare(program, cases[width], dtype, limit)


def _compare(
    program: Any, case: tuple[np.ndarray, ...], dtype: str, limit: float
) -> dict[str, Any]:
    try:
        out = np.asarray(program(*_typed(case, dtype)), np.float64)
    except Exception as error:  # the other backends are still worth comparing
        return {"passed": False, "failed": said(error)}
    exact = _exact(*case)
    error = float(np.linalg.norm(out - exact) / np.linalg.norm(exact))
    return {"error": error, "passed": error < limit}


def _case(seed: int, width: int, dtype: str) -> tuple[np.ndarray, ...]:
    """Queries, keys and values in float64 but rounded to `dtype`, a page table and lengths."""
    rng = np.random.default_rng(seed)
    full = MAX_PAGES * PAGE
    edges = [0, 1, PAGE - 1, PAGE, PAGE + 1, full, *rng.integers(0, full, 10)]
    lengths = rng.permutation(np.array(edges, np.int32)).reshape(8, 2)
    table = rng.permutation(lengths.size * MAX_PAGES).reshape(8, 2, MAX_PAGES).astype(np.int32)
    q = rng.standard_normal((8, 1, 2, 4, width))
    pool = rng.standard_normal((2, table.size, PAGE, width))
    owned = np.zeros(pool.shape[1:3], bool)
    token = np.arange(full)
    for row, slot in np.ndindex(8, 2):
        at = token[: lengths[row, slot]]
        owned[table[row, slot, at // PAGE], at % PAGE] = True
    pool[:, ~owned] = np.nan
    rounded = [np.asarray(jnp.asarray(x, dtype), np.float64) for x in (q, *pool)]
    return (*rounded, table, lengths)


def _exact(q: Any, k: Any, v: Any, table: Any, lengths: Any) -> np.ndarray:
    out = np.zeros(q.shape)
    for row, slot in np.ndindex(*lengths.shape):
        token = np.arange(lengths[row, slot])
        at = table[row, slot, token // PAGE], token % PAGE
        if len(token):
            scores = q[row, 0, slot] @ k[at].T / np.sqrt(q.shape[-1])
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[row, 0, slot] = weights / weights.sum(-1, keepdims=True) @ v[at]
    return out


def _typed(case: tuple[np.ndarray, ...], dtype: str) -> list[Any]:
    q, k, v, table, lengths = case
    page_table = PageTable.from_dense(jnp.asarray(table))
    return [*(jnp.asarray(x, dtype) for x in (q, k, v)), page_table, jnp.asarray(lengths)]


def _lower(case: tuple[np.ndarray, ...], dtype: str, backend: str, device: Device) -> Lowered:
    call = partial(ragged_decode, backend=backend, device=device)
    return jax.jit(call).lower(*_typed(case, dtype))
