"""Insert: copies the compressed cache of a prompt, or of its suffix, into the pages of a row."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jax.stages import Lowered
from jaxtyping import Array, Bool, Int

from fairkv_jax.cache import LAYERS_BY_DEVICE, KVCache
from fairkv_jax.prefill_carry import CompressedPrefix, PrefillShapes


def lower_insert(shapes: PrefillShapes) -> Lowered:
    """Lowers `insert`."""
    steps = shapes.steps
    return steps.lower(
        insert,
        steps.cache,
        shapes.carry.prefix,
        steps.number,
        steps.by_slot,
        steps.array((steps.spec.max_tokens,)),
        steps.number,
        steps.number,
        steps.array((), jnp.bool_),
        mesh=steps.mesh,
    )


@partial(jax.jit, static_argnames="mesh", donate_argnums=0)
def insert(
    cache: KVCache,
    prefix: CompressedPrefix,
    row: Int[Array, ""],
    lengths: Int[Array, "L PC"],
    token_ids: Int[Array, "S"],
    num_known: Int[Array, ""],
    num_after: Int[Array, ""],
    is_active: Bool[Array, ""],
    *,
    mesh: Mesh,
) -> KVCache:
    """Copies a prefix into the pages that the page tables give its row.

    `lengths` are those of the row afterwards. What the prefix does not bring of them is in the
    pages already, in front of it: none in an empty row, else what the prefix is a suffix of. The
    last `num_after` tokens of every slot belong to other prompts and are left out, as are those
    that come before the row's own. Slots of length 0 own nothing and write nothing. The first
    `num_known` of `token_ids` are the prompt and the tokens that the row has generated so far.
    Until the row is active, its lengths in the cache remain 0, so that decoding passes it by.
    """
    run = jax.shard_map(
        _insert_local,
        mesh=mesh,
        in_specs=(
            KVCache.partition(),
            CompressedPrefix.partition(),
            LAYERS_BY_DEVICE,
            *(PartitionSpec(),) * 5,
        ),
        out_specs=KVCache.partition(),
        check_vma=False,
    )
    return run(cache, prefix, lengths, row, token_ids, num_known, num_after, is_active)


def _insert_local(
    cache: KVCache,
    prefix: CompressedPrefix,
    lengths: Int[Array, "L C"],
    row: Array,
    token_ids: Array,
    num_known: Array,
    num_after: Array,
    is_active: Array,
) -> KVCache:
    """One device's part, inside `shard_map`."""
    num_pages, page_size, _ = cache.pool.k_pages.shape
    num_slots = lengths.shape[1]
    ends = jnp.cumsum(prefix.slot_lengths.reshape(-1))
    item = jnp.arange(len(prefix.k))
    pair = jnp.searchsorted(ends, item, side="right")
    is_kept = pair < len(ends)
    pair = jnp.minimum(pair, len(ends) - 1)
    layer, slot = pair // num_slots, pair % num_slots
    # A slot's last packed token of this prompt becomes the last one of its length.
    length = lengths[layer, slot]
    token = item - (ends[pair] - num_after - length)
    owned = is_kept & (token >= 0) & (token < length)
    start = cache.page_table.starts[layer, row, slot]
    page = cache.page_table.entries(start, jnp.where(owned, token // page_size, 0))
    page = jnp.where(owned, page, num_pages)  # past the pool: dropped
    token = token % page_size
    return replace(
        cache,
        pool=cache.pool.write(page, token, prefix.k, prefix.v),
        lengths=cache.lengths.at[:, row].set(jnp.where(is_active, lengths, 0)),
        token_ids=cache.token_ids.at[row].set(token_ids),
        num_known=cache.num_known.at[row].set(num_known),
    )
