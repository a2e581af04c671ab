"""The ragged paged KV cache on the devices.

One pool serves all layers, so what every device must hold is its load over the whole model:

    pool.k_pages, v_pages  [P*pages, page_size, H]  split by device
    pool.scales            [P*pages, page_size]     for keys and for values, of int8 pages only
    page_table.pages       [P*E]                    page numbers within the device, split by device
    page_table.starts      [L, B, P*C]              where a (layer, row, slot) finds its pages there
    lengths                [L, B, P*C]              cached tokens; 0 where the slot owns no part
    token_ids              [B, S]                   each row's prompt and output, on all devices
    num_known              [B]                      how many of them the host has given
    queries                [L, B, w, P*C, G, H]     each row's last w queries, if they are needed

Rows stand before slots, as in the queries of a step. Ownership is length: a replica that does not
serve a row has length 0 there. What a step samples is written to `token_ids` and read by the next
one, so that the host need not see it in between; it never overwrites a known token. The host keeps
account of the pages, see `KVCacheManager`, and sends what has changed in the page tables.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from fairkv_jax.kv_cache_spec import SCALE_DTYPE, KVCacheSpec
from fairkv_jax.pallas.ragged_decode import PageTable, Pool
from fairkv_jax.shapes import TENSOR_AXIS

LAYERS_BY_DEVICE: Any = PartitionSpec(None, TENSOR_AXIS)
"""Arrays with a leading layer axis whose second axis is split by device."""
_BY_DEVICE: Any = PartitionSpec(TENSOR_AXIS)
_BY_SLOT: Any = PartitionSpec(None, None, TENSOR_AXIS)
_WHOLE: Any = PartitionSpec()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """The cache on the devices; donated to every step and updated in place."""

    pool: Pool
    page_table: PageTable
    lengths: Int[Array, "L B PC"]
    token_ids: Int[Array, "B S"]
    num_known: Int[Array, "B"]
    queries: Float[Array, "L B w PC G H"] | None = None
    """The queries of each row's last decode steps, after RoPE, for the compression of rows while
    they decode: that of position p is at p % w."""

    @classmethod
    def partition(cls) -> "KVCache":
        """How each array is split over the mesh, as a prefix of the cache's pytree."""
        page_table = PageTable(_BY_DEVICE, _BY_SLOT)
        queries: Any = PartitionSpec(None, None, None, TENSOR_AXIS)
        return cls(_BY_DEVICE, page_table, _BY_SLOT, _WHOLE, _WHOLE, queries)

    @classmethod
    def shapes(cls, spec: KVCacheSpec) -> "KVCache":
        """The cache with shapes in place of arrays."""
        pool = (spec.num_devices * spec.pages_per_device, spec.page_size, spec.head_dim)
        pairs = (spec.num_layers, spec.num_rows, spec.num_slots)
        integers: Any = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
        pages: Any = jax.ShapeDtypeStruct(pool, jnp.dtype(spec.dtype))
        scale: Any = jax.ShapeDtypeStruct(pool[:2], jnp.dtype(SCALE_DTYPE))
        scales = (scale, scale) if spec.is_quantized else None
        table = PageTable(integers((spec.num_devices * spec.table_entries,)), integers(pairs))
        store, queries = spec.queries, None
        if store is not None:
            size = (store.num_queries, spec.num_slots, store.group_size, spec.head_dim)
            shape = (spec.num_layers, spec.num_rows, *size)
            queries: Any = jax.ShapeDtypeStruct(shape, jnp.dtype(store.dtype))
        return cls(
            Pool(pages, pages, scales),
            table,
            integers(pairs),
            integers((spec.num_rows, spec.max_tokens)),
            integers((spec.num_rows,)),
            queries,
        )

    @classmethod
    def empty(cls, mesh: Mesh, spec: KVCacheSpec) -> "KVCache":
        """A cache in which no row owns anything."""
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), cls.partition())
        # JAX finds what it has compiled by the function, so this one outlives the call.
        return jax.jit(_zeros, static_argnums=0, out_shardings=shardings)(spec)


def _zeros(spec: KVCacheSpec) -> KVCache:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), KVCache.shapes(spec))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PrefixView:
    """The prefix that one row of the cache holds, as the prefill of its suffix reads it."""

    pool: Pool
    page_table: PageTable
    row: Int[Array, ""]
    lengths: Int[Array, "L PC"]
    """Cached tokens of the slots that own the row; 0 in the others."""

    @classmethod
    def of(cls, cache: KVCache, row: Any, lengths: Any) -> "PrefixView":
        """Returns the prefix in a row of the cache; `row` and `lengths` are arrays or shapes."""
        return cls(cache.pool, cache.page_table, row, lengths)

    @classmethod
    def partition(cls) -> "PrefixView":
        """Returns how each array is split over the mesh."""
        return cls.of(KVCache.partition(), _WHOLE, LAYERS_BY_DEVICE)

    def of_layer(self, layer: Int[Array, ""]) -> tuple[PageTable, Int[Array, "C"]]:
        """Returns where this device's slots have their pages in one layer, and their lengths."""
        table = self.page_table.of_layer(layer)
        table = replace(table, starts=table.starts[self.row])
        return table, jax.lax.dynamic_index_in_dim(self.lengths, layer, keepdims=False)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TableWrites:
    """Changes of the page tables, at most n of each kind per device.

    Indices count within the device; those past the end of the array are left out.
    """

    entry_index: Int[Array, "P n"]
    entry_value: Int[Array, "P n"]
    start_index: Int[Array, "P n"]
    """Indices into the flattened [L, B, C]."""
    start_value: Int[Array, "P n"]

    @classmethod
    def partition(cls) -> "TableWrites":
        """How each array is split over the mesh."""
        return cls(_BY_DEVICE, _BY_DEVICE, _BY_DEVICE, _BY_DEVICE)


def write_table(page_table: PageTable, writes: TableWrites) -> PageTable:
    """Applies changes to this device's page table, inside `shard_map`."""
    pages = page_table.pages.at[writes.entry_index[0]].set(writes.entry_value[0], mode="drop")
    starts = page_table.starts.reshape(-1)
    starts = starts.at[writes.start_index[0]].set(writes.start_value[0], mode="drop")
    return PageTable(pages, starts.reshape(page_table.starts.shape))


@partial(jax.jit, static_argnames="mesh", donate_argnums=0)
def write_tables(page_table: PageTable, writes: TableWrites, *, mesh: Mesh) -> PageTable:
    """Applies changes to the page tables of all devices."""
    partition = KVCache.partition().page_table
    run = jax.shard_map(
        write_table,
        mesh=mesh,
        in_specs=(partition, TableWrites.partition()),
        out_specs=partition,
        check_vma=False,
    )
    return run(page_table, writes)


@partial(jax.jit, static_argnames="mesh", donate_argnums=0)
def copy_pages(
    pool: Pool, source: Int[Array, "P n"], target: Int[Array, "P n"], *, mesh: Mesh
) -> Pool:
    """Copies pages of keys and values within each device.

    Page numbers count within the device; a target past the end is left out.
    """
    return _on_each_device(Pool.copy, pool, source, target, mesh)


REPLICATED_AT_ONCE = 64
"""Pages that one call of `replicate_pages` copies at most."""


@partial(jax.jit, static_argnames="mesh", donate_argnums=0)
def replicate_pages(
    pool: Pool, source: Int[Array, "P n"], target: Int[Array, "P n"], *, mesh: Mesh
) -> Pool:
    """Copies pages of keys and values between devices, see `Pool.exchange`."""
    return _on_each_device(partial(Pool.exchange, axis=TENSOR_AXIS), pool, source, target, mesh)


def _on_each_device(
    change: Callable[[Pool, Array, Array], Pool],
    pool: Pool,
    source: Array,
    target: Array,
    mesh: Mesh,
) -> Pool:
    """Changes every device's part of the pool, given its own sources and targets."""
    run = jax.shard_map(
        lambda pool, source, target: change(pool, source[0], target[0]),
        mesh=mesh,
        in_specs=(_BY_DEVICE, _BY_DEVICE, _BY_DEVICE),
        out_specs=_BY_DEVICE,
        check_vma=False,
    )
    return run(pool, source, target)


@partial(jax.jit, donate_argnums=0)
def release_rows(lengths: Int[Array, "L B PC"], keeps: Int[Array, "B"]) -> Int[Array, "L B PC"]:
    """Sets the lengths of the rows where `keeps` is 0 to 0."""
    return lengths * keeps[:, None]


def grow(cache: KVCache, num_rows: int) -> KVCache:
    """Adds one to the length of each owned slot of the first rows, inside `shard_map`."""
    lengths = cache.lengths[:, :num_rows]
    # Not by `.at[:, :num_rows].add`: over all rows its scatter has no index, and XLA's partitioner
    # (jaxlib 0.11.2, for GPUs) crashes on it.
    grown = lengths + (lengths > 0)
    lengths = jax.lax.dynamic_update_slice_in_dim(cache.lengths, grown, 0, axis=1)
    return replace(cache, lengths=lengths)
