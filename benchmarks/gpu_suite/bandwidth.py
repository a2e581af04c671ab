"""Measures the bandwidth of decode attention: the bytes that must be read, divided by the time.

A copy and other implementations are measured in the same run. One program runs all layers of a
pool, as a decode step does, so that the host does not time launches one by one and no layer finds
its keys in the cache of the last repeat.
"""

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Lowered

from benchmarks.gpu_suite.inputs import CacheShape, Sizes, drawn, drawn_lengths, page_table
from benchmarks.gpu_suite.programs import compile_all, said, seconds_of
from fairkv_jax.pallas.ragged_decode import BACKENDS, Device, ragged_decode

KV_HEADS, GROUP, DTYPE = 8, 4, "bfloat16"
LENGTHS = {"uniform": 0.0, "imbalanced": 0.6}

Attend = Callable[..., jax.Array]


def measure(sizes: Sizes, device: Device) -> Iterator[dict[str, Any]]:
    """Yields the copy, then one record per (width, batch, lengths, implementation)."""
    copy = copy_bandwidth(sizes)
    yield {"implementation": "copy", "bytes_per_second": copy, "of_copy": 1.0}
    for width in sizes.widths:
        for batch in sizes.batches:
            for record in _compare(sizes, device, width, batch):
                if "bytes_per_second" in record:
                    record["of_copy"] = record["bytes_per_second"] / copy
                yield {"width": width, "batch": batch} | record


def copy_bandwidth(sizes: Sizes) -> float:
    """Bytes that a large copy reads and writes per second."""
    x = drawn(0, (1 << (20 if sizes.interpret else 30),), DTYPE)
    seconds = seconds_of(jax.jit(lambda x: -x), (x,), sizes.repeats)
    return 2 * x.nbytes / seconds


def lengths_of(sizes: Sizes, batch: int) -> dict[str, np.ndarray]:
    """Lengths [L, B, K] by name, all with the same mean."""
    shape = (sizes.layers, batch, KV_HEADS, sizes.mean_tokens)
    return {name: drawn_lengths(1, *shape, imbalance) for name, imbalance in LENGTHS.items()}


def queries(batch: int, width: int) -> jax.Array:
    return drawn(3, (batch, 1, KV_HEADS, GROUP, width), DTYPE)


def lower_walk(attend: Attend, lengths: np.ndarray, width: int, cache: CacheShape) -> Lowered:
    """Lowers one program over all layers: (q, k_pages, v_pages, table, lengths) -> out."""

    def step(q: Any, k_pages: Any, v_pages: Any, table: Any, lengths: Any) -> jax.Array:
        def layer(q: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
            out = attend(q, k_pages, v_pages, table, lengths, index)
            # The next layer's queries depend on this output, so that XLA can remove no layer.
            return (q + 1e-3 * out.astype(q.dtype)).astype(q.dtype), None

        return jax.lax.scan(layer, q, jnp.arange(len(lengths)))[0]

    _, batch, slots = lengths.shape
    q = jax.ShapeDtypeStruct((batch, 1, slots, GROUP, width), DTYPE)
    pages = cache.pages(width, DTYPE)
    shape = jax.ShapeDtypeStruct(lengths.shape, jnp.int32)
    return jax.jit(step).lower(q, pages, pages, cache.table(lengths), shape)


def _compare(sizes: Sizes, device: Device, width: int, batch: int) -> Iterator[dict[str, Any]]:
    cases = lengths_of(sizes, batch)
    cache = CacheShape.of(*cases.values())
    programs: dict[tuple[str, str], Callable[[], Lowered]] = {}
    for case, lengths in cases.items():
        for name, attend in _padded_peers(sizes, lengths).items():
            programs[name, case] = partial(lower_walk, attend, lengths, width, cache)
    lengths = cases["uniform"]
    for name, attend in (_ours(device) | _paged_peers(sizes, cache)).items():
        programs[name, ""] = partial(lower_walk, attend, lengths, width, cache)
    compiled = compile_all(programs)
    k_pages, v_pages = (drawn(seed, cache.pages(width, DTYPE).shape, DTYPE) for seed in (4, 5))
    for case, lengths in cases.items():
        arrays = k_pages, v_pages, page_table(2, lengths, cache), jnp.asarray(lengths)
        must_read = int(lengths.sum()) * 2 * width * k_pages.dtype.itemsize
        for (name, only), program in compiled.items():
            if only not in ("", case):
                continue
            record: dict[str, Any] = {"lengths": case, "implementation": name}
            try:
                if isinstance(program, Exception):
                    raise program
                seconds = seconds_of(program, (queries(batch, width), *arrays), sizes.repeats)
            except Exception as error:  # a failing peer must not end the suite
                yield record | {"failed": said(error)}
                continue
            record["layer_us"] = 1e6 * seconds / len(lengths)
            yield record | {"bytes_per_second": must_read / seconds}


def _ours(device: Device) -> dict[str, Attend]:
    return {
        name: partial(ragged_decode, backend=name, device=device) for name in reversed(BACKENDS[1:])
    }


def _paged_peers(sizes: Sizes, cache: CacheShape) -> dict[str, Attend]:
    if sizes.interpret:
        return {}
    return {"pallas paged_attention": partial(_paged_attention, cache.max_pages)}


def _padded_peers(sizes: Sizes, lengths: np.ndarray) -> dict[str, Attend]:
    if sizes.interpret:
        return {}
    longest = int(lengths.max())
    return {
        f"{name}, padded": partial(_padded_attention, implementation, longest)
        for name, implementation in (("cudnn", "cudnn"), ("dense", "xla"))
    }


def _paged_attention(
    max_pages: int, q: Any, k_pages: Any, v_pages: Any, table: Any, lengths: Any, layer: Any
) -> jax.Array:
    """JAX's own paged kernel, with (row, KV head) flattened into its batch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention
    splits, block = 4, 4
    batch, _, slots, group, width = q.shape
    starts = table.of_layer(layer).starts.reshape(batch * slots, 1)
    padded = max_pages + -max_pages % (splits * block)
    pages = table.entries(starts, jnp.arange(padded))
    flat = (q * width**-0.5).reshape(batch * slots, group, width)
    out = paged_attention(
        flat.astype(q.dtype),
        k_pages[None],
        v_pages[None],
        pages,
        lengths[layer].reshape(-1),
        k_splits=splits,
        pages_per_compute_block=block,
    )
    return out.reshape(q.shape)


def _padded_attention(
    implementation: Any,
    longest: int,
    q: Any,
    k_pages: Any,
    v_pages: Any,
    _table: Any,
    lengths: Any,
    layer: Any,
) -> jax.Array:
    """Attention over contiguous keys, with every (row, KV head) padded to the longest.

    The keys are views of the same pool, so that they are read from memory as the kernels' are.
    """
    batch, _, slots, group, width = q.shape
    pairs = batch * slots
    size = pairs * longest
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
        key_value_seq_lengths=lengths[layer].reshape(-1),
        query_seq_lengths=jnp.ones(pairs, jnp.int32),
        implementation=implementation,
    )
    return out.reshape(q.shape)
