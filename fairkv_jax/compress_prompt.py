"""Compresses a prompt that has been kept whole, over the heads of all layers together."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jax.stages import Lowered
from jaxtyping import Array, Float, Int

from fairkv_jax.attention import KEY_BLOCK
from fairkv_jax.cache import LAYERS_BY_DEVICE
from fairkv_jax.compress.budgets import MaxKept
from fairkv_jax.compress.contract import Chunk, Method, Scores
from fairkv_jax.compress_layer import pack, with_layer
from fairkv_jax.models.model import Layer, Model
from fairkv_jax.prefill_carry import CompressedPrefix, PrefillCarry, PrefillShapes
from fairkv_jax.repeat_prompt import abstract_carry
from fairkv_jax.shapes import TENSOR_AXIS
from fairkv_jax.sharding.load_weights import partition_specs


def lower_compress_prompt(shapes: PrefillShapes) -> Lowered:
    """Lowers `compress_prompt`."""
    steps = shapes.steps
    return steps.lower(
        compress_prompt,
        steps.model,
        shapes.carry,
        abstract_carry(shapes).stats,
        steps.number,
        steps.by_head,
        steps.by_slot,
        steps.by_head,
        mesh=steps.mesh,
        method=shapes.methods[0],
        max_kept=shapes.max_kept,
    )


@partial(jax.jit, static_argnames=("mesh", "method", "max_kept"), donate_argnums=1)
def compress_prompt(
    model: Model,
    prompt: PrefillCarry,
    stats: Any,
    length: Int[Array, ""],
    budgets: Int[Array, "L K"],
    head_of_slot: Int[Array, "L PC"],
    first_slot: Int[Array, "L K"],
    *,
    mesh: Mesh,
    method: Method,
    max_kept: MaxKept,
) -> PrefillCarry:
    """Packs what the method keeps of a prompt that has been kept whole and repeated.

    The method selects over the heads of all layers together; `stats` are those of a
    `RepetitionCarry`.
    """

    def local(model: Model, prompt: PrefillCarry, *rest: Any) -> PrefillCarry:
        return _compress_local(model, prompt, *rest, method=method, max_kept=max_kept)

    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(
            partition_specs(model),
            PrefillCarry.partition(),
            LAYERS_BY_DEVICE,
            LAYERS_BY_DEVICE,
            *(PartitionSpec(),) * 3,
        ),
        out_specs=PrefillCarry.partition(),
        check_vma=False,
    )
    return run(model, prompt, stats, head_of_slot, first_slot, length, budgets)


def _compress_local(
    model: Model,
    prompt: PrefillCarry,
    stats: Any,
    head_of_slot: Int[Array, "L C"],
    first_slot: Int[Array, "L K"],
    length: Int[Array, ""],
    budgets: Int[Array, "L K"],
    *,
    method: Method,
    max_kept: MaxKept,
) -> PrefillCarry:
    """Runs one device's part of `compress_prompt`, inside `shard_map`."""
    num_layers, num_heads = first_slot.shape
    budgets = jnp.minimum(budgets, length)

    def score_layer(index: Array) -> Scores:
        k, v = prompt.whole_layer(index)
        observed = _observe_prompt(
            method,
            jax.tree.map(lambda x: x[index], stats),
            prompt,
            length,
            model.layer(index),
            k,
            v,
        )
        of_slots = budgets[index][jnp.maximum(head_of_slot[index], 0)]
        scores = method.scorer.score(observed, k, v, length, of_slots)
        gathered = jax.lax.all_gather(scores, TENSOR_AXIS, tiled=True)
        return jax.tree.map(lambda x: x[first_slot[index]], gathered)

    scores = jax.lax.map(score_layer, jnp.arange(num_layers))
    scores = jax.tree.map(lambda x: x.reshape(num_layers * num_heads, -1), scores)
    keep = method.select(scores, budgets.reshape(-1), length)
    keep = keep.reshape(num_layers, num_heads, -1)

    def pack_layer(index: Array, prefix: CompressedPrefix) -> CompressedPrefix:
        k, v = prompt.whole_layer(index)
        layer = replace(prompt, k=k, v=v)
        return with_layer(prefix, index, pack(layer, keep[index], head_of_slot[index], max_kept))

    # What is packed must not overwrite what has not been read yet.
    empty = replace(jax.tree.map(jnp.zeros_like, prompt.prefix), logits=prompt.prefix.logits)
    return replace(prompt, prefix=jax.lax.fori_loop(0, num_layers, pack_layer, empty))


def _observe_prompt(
    method: Method,
    stats: Any,
    prompt: PrefillCarry,
    length: Int[Array, ""],
    layer: Layer,
    k: Float[Array, "C T H"],
    v: Float[Array, "C T H"],
) -> Any:
    """Shows the scorer the prompt's own keys and values, block by block."""
    num_tokens = k.shape[1]
    size = min(KEY_BLOCK, num_tokens)
    gone: Any = None  # see `RepeatingScorer`

    def observe(i: Array, stats: Any) -> Any:
        keys, values = (
            jax.lax.dynamic_slice_in_dim(x, i * size, size, 1).swapaxes(0, 1) for x in (k, v)
        )
        chunk = Chunk(
            length,
            first_position=prompt.first_position,
            positions=i * size + jnp.arange(size),
            frequencies=gone,
            x=gone,
            q_unrotated=gone,
            q=gone,
            k=keys,
            v=values,
            w_o=layer.output_weights(),
        )
        return method.scorer.observe(stats, chunk)

    return jax.lax.fori_loop(0, num_tokens // size, observe, stats)
