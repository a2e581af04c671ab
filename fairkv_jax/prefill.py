"""Prefill: a prompt through the model, each layer's cache compressed as soon as it is there.

Every device computes the slots that it holds. The scores of all heads are gathered, every device
makes the same selection, and packs what its own slots keep, head after head:

    packed keys of one layer and device   [ slot 0's kept tokens | slot 1's | ... | unused ]
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from fairkv_jax.attention import causal_attention
from fairkv_jax.cache import KVCache
from fairkv_jax.compress import Policy
from fairkv_jax.models import Llama
from fairkv_jax.shapes import TENSOR_AXIS
from fairkv_jax.sharding.place import partition_specs
from fairkv_jax.sharding.slots import SlotLayout

_BY_DEVICE = PartitionSpec(None, TENSOR_AXIS)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prefix:
    """The compressed cache of one prompt, ready to be inserted into a row.

    R is the most tokens that a device packs a layer; `positions` counts from the prompt's start.
    """

    k: Float[Array, "L PR H"]
    v: Float[Array, "L PR H"]
    positions: Int[Array, "L PR"]
    slot_lengths: Int[Array, "L PC"]
    """Kept tokens of every slot, replicas included; 0 in empty slots."""
    head_lengths: Int[Array, "L K"]
    logits: Float[Array, "V"]
    """Of the token that follows the prompt, float32."""

    @classmethod
    def partition(cls) -> "Prefix":
        """How each array is split over the mesh."""
        whole: Any = PartitionSpec()
        split: Any = _BY_DEVICE
        return cls(split, split, split, split, whole, whole)


@dataclass(frozen=True)
class KeptTokens:
    """What a prefix kept of its prompt, on the host."""

    lengths: np.ndarray
    """[L, K] tokens."""
    positions: list[list[np.ndarray]] | None
    """For each layer and head its kept positions, ascending."""


def kept_tokens(prefix: Prefix, layout: SlotLayout, *, positions: bool) -> KeptTokens:
    """Reads back what a prefix kept; its positions only where they are asked for."""
    lengths = np.asarray(prefix.head_lengths)
    if not positions:
        return KeptTokens(lengths, None)
    num_layers = len(lengths)
    packed = np.asarray(prefix.positions).reshape(num_layers, layout.num_devices, -1)
    by_slot = np.asarray(prefix.slot_lengths).reshape(num_layers, layout.num_devices, -1)
    starts = (np.cumsum(by_slot, -1) - by_slot).reshape(num_layers, -1)

    def of_head(layer: int, head: int) -> np.ndarray:
        slot = layout.first_slot[layer, head]
        start = starts[layer, slot]
        return packed[layer, slot // layout.slots_per_device][start : start + lengths[layer, head]]

    heads = range(layout.num_heads)
    return KeptTokens(lengths, [[of_head(n, head) for head in heads] for n in range(num_layers)])


@partial(jax.jit, static_argnames=("mesh", "policy", "packed_size"))
def prefill(
    model: Llama,
    tokens: Int[Array, "T"],
    length: Int[Array, ""],
    budgets: Int[Array, "L K"],
    slot_head: Int[Array, "L PC"],
    first_slot: Int[Array, "L K"],
    *,
    mesh: Mesh,
    policy: Policy,
    packed_size: int,
) -> Prefix:
    """Runs a prompt of `length` tokens, padded to T, keeping `budgets` tokens of it.

    `packed_size` bounds what the policy keeps of a layer over all heads.
    """

    def local(model: Llama, slot_head: Array, *replicated: Array) -> Prefix:
        return _prefill_local(model, slot_head, *replicated, policy=policy, size=packed_size)

    whole = PartitionSpec()
    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(partition_specs(model), _BY_DEVICE, whole, whole, whole, whole),
        out_specs=Prefix.partition(),
        check_vma=False,
    )
    return run(model, slot_head, tokens, length, budgets, first_slot)


def _prefill_local(
    model: Llama,
    slot_head: Int[Array, "L C"],
    tokens: Int[Array, "T"],
    length: Int[Array, ""],
    budgets: Int[Array, "L K"],
    first_slot: Int[Array, "L K"],
    *,
    policy: Policy,
    size: int,
) -> Prefix:
    """The part of one device, inside `shard_map`."""

    def attend(
        q: Array, k: Array, v: Array, cache: None, layer: tuple[Array, Array, Array]
    ) -> tuple[Array, None, tuple[Array, ...]]:
        slot_head, first_slot, budgets = layer
        # The prompt belongs to no replica yet: the first one speaks for the head.
        slots = len(slot_head)
        slot = jax.lax.axis_index(TENSOR_AXIS) * slots + jnp.arange(slots)
        speaks = first_slot[slot_head] == slot
        out = jnp.where(speaks[:, None, None], causal_attention(q, k, v), 0)
        scores = policy.scorer(q, k, length, jnp.min(budgets))
        scores = jax.lax.all_gather(scores, TENSOR_AXIS, tiled=True)
        keep = policy.select(scores[first_slot], length, budgets)
        packed = _pack(k, v, keep, slot_head, size)
        return out, cache, (*packed, jnp.sum(keep, 1))

    positions = jnp.arange(tokens.shape[0])
    x, _, outputs = model(tokens, positions, attend, None, (slot_head, first_slot, budgets))
    last = jax.lax.dynamic_slice_in_dim(x, length - 1, 1)
    k, v, kept_at, slot_lengths, head_lengths = outputs
    return Prefix(k, v, kept_at, slot_lengths, head_lengths, model.logits(last)[0])


def _pack(
    k: Float[Array, "T C H"],
    v: Float[Array, "T C H"],
    keep: Array,
    slot_head: Int[Array, "C"],
    size: int,
) -> tuple[Array, Array, Array, Array]:
    """The kept keys, values and positions of this device's slots, one after another."""
    num_tokens, slots, _ = k.shape
    kept = keep[slot_head] & (slot_head >= 0)[:, None]
    # What the policy may keep is bounded over all heads, and by what the slots hold.
    size = min(size, slots * num_tokens)
    index = jnp.nonzero(kept.reshape(-1), size=size, fill_value=0)[0]
    slot, position = index // num_tokens, index % num_tokens
    return k[position, slot], v[position, slot], position, jnp.sum(kept, 1)


@partial(jax.jit, static_argnames="mesh", donate_argnums=0)
def insert(
    cache: KVCache,
    prefix: Prefix,
    row: Int[Array, ""],
    page_table: Int[Array, "L PC max_pages"],
    lengths: Int[Array, "L PC"],
    *,
    mesh: Mesh,
) -> KVCache:
    """Copies a prefix into the pages of a row; slots of length 0 own nothing and write nothing."""
    run = jax.shard_map(
        _insert_local,
        mesh=mesh,
        in_specs=(
            KVCache.partition(),
            Prefix.partition(),
            PartitionSpec(),
            _BY_DEVICE,
            _BY_DEVICE,
        ),
        out_specs=KVCache.partition(),
        check_vma=False,
    )
    return run(cache, prefix, row, page_table, lengths)


def _insert_local(
    cache: KVCache, prefix: Prefix, row: Array, page_table: Array, lengths: Array
) -> KVCache:
    num_pages, page_size, width = cache.k_pages.shape
    num_layers, size, _ = prefix.k.shape
    ends = jnp.cumsum(prefix.slot_lengths, axis=1)
    item = jnp.arange(size)
    slot = jnp.sum(item[:, None] >= ends[:, None], axis=-1)
    is_kept = slot < ends.shape[1]
    slot = jnp.minimum(slot, ends.shape[1] - 1)
    layer = jnp.arange(num_layers)[:, None]
    at = item - (ends - prefix.slot_lengths)[layer, slot]
    owned = is_kept & (lengths[layer, slot] > 0)
    page = page_table[layer, slot, jnp.where(owned, at // page_size, 0)]
    page = jnp.where(owned, page, num_pages).reshape(-1)  # beyond the pool: dropped
    at = (at % page_size).reshape(-1)
    return KVCache(
        cache.k_pages.at[page, at].set(prefix.k.reshape(-1, width), mode="drop"),
        cache.v_pages.at[page, at].set(prefix.v.reshape(-1, width), mode="drop"),
        cache.page_table.at[:, row].set(page_table),
        cache.lengths.at[:, row].set(lengths),
    )


@partial(jax.jit, donate_argnums=0)
def release(lengths: Int[Array, "L B PC"], row: Int[Array, ""]) -> Int[Array, "L B PC"]:
    """Takes all ownership of a row away."""
    return lengths.at[:, row].set(0)
