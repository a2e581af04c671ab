"""Every backend against float64 NumPy on fresh random inputs; unused places hold NaN."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_suite.inputs import PAGE, Sizes
from fairkv_jax.pallas.ragged_decode import BACKENDS, Device, ragged_decode

LIMITS = {"float32": 1e-5, "float16": 3e-3, "bfloat16": 2e-2}
MAX_PAGES = 9


def measure(sizes: Sizes, device: Device) -> list[dict[str, Any]]:
    """One record a backend, type and head width: |out - exact| / |exact|."""
    seed = int.from_bytes(np.random.default_rng().bytes(4))
    records = []
    for dtype, limit in LIMITS.items():
        for width in sizes.widths:
            arrays = _case(seed, width, dtype)
            exact = _exact(*arrays)
            for backend in BACKENDS[1:]:
                record: dict[str, Any] = {"backend": backend, "dtype": dtype, "width": width}
                records.append(record | {"seed": seed, "limit": limit})
                try:
                    out = _run(arrays, dtype, backend, device)
                except NotImplementedError as error:
                    records[-1]["skipped"] = str(error)
                    continue
                error = float(np.linalg.norm(out - exact) / np.linalg.norm(exact))
                records[-1] |= {"error": error, "passed": error < limit}
    return records


def _case(seed: int, width: int, dtype: str) -> tuple[np.ndarray, ...]:
    """q, keys, values in float64, already rounded to `dtype`, a page table and lengths."""
    rng = np.random.default_rng(seed)
    full = MAX_PAGES * PAGE
    edges = [0, 1, PAGE - 1, PAGE, PAGE + 1, full, *rng.integers(0, full, 10)]
    lengths = rng.permutation(np.array(edges, np.int32)).reshape(8, 2)
    table = rng.permutation(lengths.size * MAX_PAGES).reshape(8, 2, MAX_PAGES).astype(np.int32)
    q = rng.standard_normal((8, 2, 4, width))
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
            scores = q[row, slot] @ k[at].T / np.sqrt(q.shape[-1])
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[row, slot] = weights / weights.sum(-1, keepdims=True) @ v[at]
    return out


def _run(arrays: tuple[Any, ...], dtype: str, backend: str, device: Device) -> np.ndarray:
    q, k, v, table, lengths = arrays
    typed = [jnp.asarray(x, dtype) for x in (q, k, v)]

    def call(*args: Any) -> jax.Array:
        return ragged_decode(*args, backend=backend, device=device)

    return np.asarray(jax.jit(call)(*typed, table, lengths), np.float64)
