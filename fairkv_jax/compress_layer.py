"""Compresses a layer whose chunks have all run: selects tokens per head, and packs them."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jax.stages import Lowered
from jaxtyping import Array, Bool, Int

from fairkv_jax.cache import LAYERS_BY_DEVICE
from fairkv_jax.compress.budgets import MaxKept
from fairkv_jax.compress.contract import (
    Method,
    Scores,
    distinct_scorers,
    scorer_index,
)
from fairkv_jax.prefill_carry import CompressedPrefix, PrefillCarry, PrefillShapes
from fairkv_jax.shapes import TENSOR_AXIS

PackedLayer = tuple[Array, Array, Array, Array, Array]
"""Keys, values and positions of one layer's kept tokens; their numbers by slot and by head."""


def lower_compress_layer(shapes: PrefillShapes) -> Lowered:
    """Lowers `compress_layer`."""
    steps = shapes.steps
    return steps.lower(
        compress_layer,
        shapes.carry,
        steps.number,
        steps.number,
        steps.by_head,
        steps.number,
        steps.by_slot,
        steps.by_head,
        mesh=steps.mesh,
        methods=shapes.methods,
        max_kept=shapes.max_kept,
    )


@partial(jax.jit, static_argnames=("mesh", "methods", "max_kept"), donate_argnums=0)
def compress_layer(
    carry: PrefillCarry,
    layer: Int[Array, ""],
    length: Int[Array, ""],
    budgets: Int[Array, "L K"],
    method: Int[Array, ""],
    head_of_slot: Int[Array, "L PC"],
    first_slot: Int[Array, "L K"],
    *,
    mesh: Mesh,
    methods: tuple[Method, ...],
    max_kept: MaxKept,
) -> PrefillCarry:
    """Packs what `methods[method]` keeps of a layer whose chunks have all run."""

    def local(carry: PrefillCarry, head_of_slot: Array, *whole: Array) -> PrefillCarry:
        return _compress_layer_local(
            carry, head_of_slot, *whole, methods=methods, max_kept=max_kept
        )

    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(PrefillCarry.partition(), LAYERS_BY_DEVICE, *(PartitionSpec(),) * 5),
        out_specs=PrefillCarry.partition(),
        check_vma=False,
    )
    return run(carry, head_of_slot, first_slot, layer, length, budgets, method)


def _compress_layer_local(
    carry: PrefillCarry,
    head_of_slot: Int[Array, "L C"],
    first_slot: Int[Array, "L K"],
    layer: Int[Array, ""],
    length: Int[Array, ""],
    budgets: Int[Array, "L K"],
    method: Int[Array, ""],
    *,
    methods: tuple[Method, ...],
    max_kept: MaxKept,
) -> PrefillCarry:
    """Runs one device's part of `compress_layer`, inside `shard_map`."""
    scorers = distinct_scorers(methods)
    heads = head_of_slot[layer]
    of_heads = jnp.minimum(budgets[layer], length)
    of_slots = of_heads[jnp.maximum(heads, 0)]

    branches = [
        partial(scorer.score, stats, carry.k, carry.v, length, of_slots)
        for scorer, stats in zip(scorers, carry.stats, strict=True)
    ]
    has_secondary = any(jax.eval_shape(each).secondary is not None for each in branches)

    def score(branch: Callable[[], Scores]) -> Scores:
        scores = branch()
        # All branches of the switch must return the same arrays.
        if has_secondary and scores.secondary is None:
            return replace(scores, secondary=scores.primary)
        return scores

    chosen = scorer_index(methods, method)
    scores = jax.lax.switch(chosen, [partial(score, branch) for branch in branches])
    gathered = jax.lax.all_gather(scores, TENSOR_AXIS, tiled=True)
    by_head = jax.tree.map(lambda x: x[first_slot[layer]], gathered)
    selections = [partial(each.select, by_head, of_heads, length) for each in methods]
    keep = jax.lax.switch(method, selections)
    packed = pack(carry, keep, heads, max_kept)
    return replace(carry, prefix=with_layer(carry.prefix, layer, packed))


def pack(
    carry: PrefillCarry,
    keep: Bool[Array, "K T"],
    head_of_slot: Int[Array, "C"],
    max_kept: MaxKept,
) -> PackedLayer:
    """Packs the kept tokens of this device's slots of the current layer, slot after slot."""
    num_slots, num_tokens, _ = carry.k.shape
    size = max_kept.in_layer_of(num_slots, num_tokens)
    kept = keep[head_of_slot] & (head_of_slot >= 0)[:, None]
    flat = kept.reshape(-1)
    output_index = jnp.where(flat, jnp.cumsum(flat) - 1, size)  # out of bounds: dropped
    index = jnp.zeros(size, jnp.int32).at[output_index].set(jnp.arange(flat.size), mode="drop")
    slot, token = index // num_tokens, index % num_tokens
    k, v = carry.k[slot, token], carry.v[slot, token]
    return k, v, carry.first_position + token, jnp.sum(kept, 1), jnp.sum(keep, 1)


def with_layer(
    prefix: CompressedPrefix, layer: Int[Array, ""], packed: PackedLayer
) -> CompressedPrefix:
    """Returns the prefix with one layer packed after those before it.

    The block of a layer is as long as the most that a layer can keep. What it covers beyond its
    tokens belongs to the next layers, which are packed later.
    """
    k, v, positions, of_slots, of_heads = packed
    before = jnp.arange(len(prefix.slot_lengths))[:, None] < layer
    start = jnp.sum(jnp.where(before, prefix.slot_lengths, 0))
    blocks = ((prefix.k, k), (prefix.v, v), (prefix.positions, positions))
    lengths = ((prefix.slot_lengths, of_slots), (prefix.head_lengths, of_heads))
    return CompressedPrefix(
        *(jax.lax.dynamic_update_slice_in_dim(whole, block, start, 0) for whole, block in blocks),
        *(jax.lax.dynamic_update_index_in_dim(whole, new, layer, 0) for whole, new in lengths),
        logits=prefix.logits,
    )
