"""Bytes that must be read over time, beside a copy measured in the same run and beside peers.

Layers of one pool are walked in one program, as a decode step walks them: launches are not timed
one by one from the host, and no layer finds its keys in the cache of the last repeat.
"""

import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_suite.inputs import Sizes, drawn_lengths, ragged_cache
from fairkv_jax.pallas.ragged_decode import BACKENDS, Device, ragged_decode

KV_HEADS, GROUP, DTYPE = 8, 4, "bfloat16"
QUEUED = 4
LENGTHS = {"uniform": 0.0, "imbalanced": 0.6}


def measure(sizes: Sizes, device: Device) -> dict[str, Any]:
    """The copy's bytes per second, and one record a (batch, width, lengths, implementation)."""
    copy = copy_bandwidth(sizes)
    records = []
    for width in sizes.widths:
        for batch in sizes.batches:
            for name, imbalance in LENGTHS.items():
                lengths = drawn_lengths(
                    1, sizes.layers, batch, KV_HEADS, sizes.mean_tokens, imbalance
                )
                for record in _compare(sizes, device, lengths, width):
                    record |= {"batch": batch, "width": width, "lengths": name}
                    if "bytes_per_second" in record:
                        record["of_copy"] = record["bytes_per_second"] / copy
                    records.append(record)
    return {"copy_bytes_per_second": copy, "records": records}


def copy_bandwidth(sizes: Sizes) -> float:
    """Bytes read and written per second by a large copy."""
    size = 1 << (20 if sizes.interpret else 30)
    x = jax.random.normal(jax.random.key(0), (size,), "bfloat16")
    seconds = seconds_of(jax.jit(lambda x: -x), (x,), sizes.repeats)
    return 2 * x.nbytes / seconds


def seconds_of(call: Callable[..., Any], args: tuple[Any, ...], repeats: int) -> float:
    """Median seconds of a compiled call that has run once before.

    Calls are queued a few at a time, so that the host's part of one hides behind another.
    """
    jax.block_until_ready(call(*args))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(QUEUED):
            out = call(*args)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / QUEUED)
    return median(times)


def _compare(sizes: Sizes, device: Device, lengths: np.ndarray, width: int) -> list[dict[str, Any]]:
    k_pages, v_pages, table = ragged_cache(2, lengths, width, DTYPE)
    q = jax.random.normal(jax.random.key(3), (*lengths.shape[1:], GROUP, width), DTYPE)
    must_read = int(lengths.sum()) * 2 * width * k_pages.dtype.itemsize
    implementations: dict[str, Callable[..., jax.Array]] = {
        name: _ours(name, device) for name in BACKENDS[1:]
    }
    if not sizes.interpret:
        implementations |= {"pallas paged_attention": _paged_peer(table)}
        implementations |= {"cudnn, padded": _padded_peer("cudnn", int(lengths.max()))}
        implementations |= {"dense, padded": _padded_peer("xla", int(lengths.max()))}
    records = []
    for name, attend in implementations.items():
        record: dict[str, Any] = {"implementation": name}
        records.append(record)
        try:
            walk = _walk(attend)
            args = (q, k_pages, v_pages, table, jnp.asarray(lengths))
            seconds = seconds_of(walk, args, sizes.repeats)
        except Exception as error:  # a peer that cannot run here must not end the suite
            record["failed"] = f"{type(error).__name__}: {str(error)[:200]}"
            continue
        record["layer_us"] = 1e6 * seconds / len(lengths)
        record["bytes_per_second"] = must_read / seconds
    return records


def _walk(attend: Callable[..., jax.Array]) -> Any:
    def step(q: Any, k_pages: Any, v_pages: Any, table: Any, lengths: Any) -> jax.Array:
        def layer(q: jax.Array, inputs: Any) -> tuple[jax.Array, None]:
            out = attend(q, k_pages, v_pages, *inputs)
            # The next layer's queries hang on this one's output, so that none can be left out.
            return (q + 1e-3 * out.astype(q.dtype)).astype(q.dtype), None

        return jax.lax.scan(layer, q, (table, lengths))[0]

    return jax.jit(step)


def _ours(name: str, device: Device) -> Callable[..., jax.Array]:
    return lambda *args: ragged_decode(*args, backend=name, device=device)


def _paged_peer(table: jax.Array) -> Callable[..., jax.Array]:
    """JAX's own paged kernel, with (row, KV head) flattened into its batch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention
    splits, block = 4, 4
    padding = -table.shape[-1] % (splits * block)

    def attend(q: Any, k_pages: Any, v_pages: Any, table: Any, lengths: Any) -> jax.Array:
        batch, slots, group, width = q.shape
        pages = jnp.pad(table.reshape(batch * slots, -1), ((0, 0), (0, padding)))
        flat = (q * width**-0.5).reshape(batch * slots, group, width)
        out = paged_attention(
            flat.astype(q.dtype),
            k_pages[None],
            v_pages[None],
            pages,
            lengths.reshape(-1),
            k_splits=splits,
            pages_per_compute_block=block,
        )
        return out.reshape(q.shape)

    return attend


def _padded_peer(implementation: str, longest: int) -> Callable[..., jax.Array]:
    """Attention over contiguous keys, every (row, KV head) padded to the longest.

    The keys are views of the same pool, so that the bytes come from memory as ours do.
    """

    def attend(q: Any, k_pages: Any, v_pages: Any, table: Any, lengths: Any) -> jax.Array:
        batch, slots, group, width = q.shape
        pairs = batch * slots
        size = pairs * longest
        options: Any = {"implementation": implementation}
        k, v = (
            jnp.resize(x, (size, width)).reshape(pairs, longest, 1, width)
            if x.size < size * width
            else x.reshape(-1, width)[:size].reshape(pairs, longest, 1, width)
            for x in (k_pages, v_pages)
        )
        out = jax.nn.dot_product_attention(
            q.reshape(pairs, 1, group, width),
            k,
            v,
            key_value_seq_lengths=lengths.reshape(-1),
            query_seq_lengths=jnp.ones(pairs, jnp.int32),
            **options,
        )
        return out.reshape(q.shape)

    return attend
