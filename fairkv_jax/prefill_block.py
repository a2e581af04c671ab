"""One block of prompt tokens in one layer: the step that all prefills are made of."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fairkv_jax.attention import PagedPrefix, attend_to_prompt
from fairkv_jax.cache import PrefixView
from fairkv_jax.models.model import Layer, Model
from fairkv_jax.pallas.ragged_decode import rounded_to_int8
from fairkv_jax.shapes import TENSOR_AXIS


def contributing_slots(
    head_of_slot: Int[Array, "L C"], first_slot: Int[Array, "L K"], prefix: PrefixView | None
) -> Bool[Array, "L C"]:
    """Marks one replica of each head, so that a sum over devices counts each head once.

    That is the first one while no row is routed to a replica yet, else the one that owns the row's
    prefix.
    """
    if prefix is not None:
        return prefix.lengths > 0
    num_slots = head_of_slot.shape[1]
    slot = jax.lax.axis_index(TENSOR_AXIS) * num_slots + jnp.arange(num_slots)
    return jnp.take_along_axis(first_slot, jnp.maximum(head_of_slot, 0), 1) == slot


def paged_prefix(prefix: PrefixView, layer: Int[Array, ""]) -> PagedPrefix:
    """Returns one layer's part of a prefix."""
    return PagedPrefix(prefix.pool, *prefix.of_layer(layer))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerState:
    """The tokens of one layer that chunks advance: hidden states, keys and values."""

    hidden: Float[Array, "S D"]
    """Outputs for tokens of chunks that have run, inputs for the others."""
    k: Float[Array, "C T H"]
    v: Float[Array, "C T H"]
    """Keys and values of the tokens of `hidden`, and of those before them."""


@dataclass(frozen=True)
class BlockInputs:
    """What one layer computes of a block of tokens."""

    index: Int[Array, "b"]
    """Index of each token in the layer's hidden states."""
    x: Float[Array, "b D"]
    """Normalised input of the attention block."""
    angles: Float[Array, "b half"]
    q: Float[Array, "b C G H"]
    k: Float[Array, "b C H"]
    v: Float[Array, "b C H"]


def run_block(
    model: Model,
    layer: Layer,
    state: LayerState,
    contributes: Bool[Array, "C"],
    at: Int[Array, ""],
    size: int,
    *,
    first_position: Int[Array, ""],
    num_before: Int[Array, ""] | int = 0,
    begins: Int[Array, "S"] | None = None,
    prefix: PagedPrefix | None = None,
    has_int8_cache: bool = False,
) -> tuple[LayerState, BlockInputs]:
    """Runs `size` tokens from index `at` on through a layer, inside `shard_map`.

    Args:
        contributes: the slots whose attention counts, one replica of each head.
        first_position: position of the first hidden state.
        num_before: tokens whose keys and values come before those of the hidden states.
        begins: index of the first token of each token's own prompt, where several are packed.
        prefix: what comes before all of them, in the KV cache.
        has_int8_cache: whether keys and values are rounded as they will be in the cache. Then it
            does not matter which of them a token finds there, and which beside itself.
    """
    key_at, index = num_before + at, at + jnp.arange(size)
    own = None if begins is None else jax.lax.dynamic_slice_in_dim(begins, at, size)

    def attend(q: Array, k: Array, v: Array, cache: None, _: None) -> tuple[Any, None, Any]:
        if has_int8_cache:
            k, v = rounded_to_int8(k), rounded_to_int8(v)
        keys = jax.lax.dynamic_update_slice_in_dim(state.k, k.swapaxes(0, 1), key_at, 1)
        values = jax.lax.dynamic_update_slice_in_dim(state.v, v.swapaxes(0, 1), key_at, 1)
        out = attend_to_prompt(q, keys, values, key_at, prefix, own)
        out = jnp.where(contributes[:, None, None], out, 0)
        return out, cache, (q, k, v, keys, values)

    angles = model.angles(first_position + index - (0 if own is None else own))
    x = jax.lax.dynamic_slice_in_dim(state.hidden, at, size)
    out, _, (q, k, v, keys, values) = layer(x, angles, attend, None, None)
    hidden = jax.lax.dynamic_update_slice_in_dim(state.hidden, out, at, 0)
    inputs = BlockInputs(index, layer.attention_inputs(x), angles, q, k, v)
    return LayerState(hidden, keys, values), inputs
