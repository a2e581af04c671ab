"""Dense forward passes over a context and over questions about it, on all devices of a mesh.

    context ──► full attention ──► keys and values of all layers
    tails   ──► attention to these and to themselves ──► predictions, attention to the facts

A cache is compressed after a full prefill. The context is therefore always run with full attention,
and gates apply to what follows it only. A gate mixes two attentions:

    out = gate * (attention to the whole context) + (1 - gate) * (attention to what is kept of it)

and both also see the tail up to the query.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from fairkv_jax.attention import KEY_BLOCK, attend_to_prompt
from fairkv_jax.cache import LAYERS_BY_DEVICE
from fairkv_jax.models.model import Model
from fairkv_jax.profile.examples import Example
from fairkv_jax.shapes import TENSOR_AXIS
from fairkv_jax.sharding.load_weights import partition_specs

_WHOLE = PartitionSpec()
_BY_SLOT = PartitionSpec(None, None, TENSOR_AXIS)

KeysAndValues = tuple[Float[Array, "L T C H"], Float[Array, "L T C H"]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Answers:
    """What a model says to the questions of an example."""

    hidden: Float[Array, "R D"]
    """Hidden states before the last norm at the positions `Example.predicts`."""
    tokens: Int[Array, "R"]
    """The likeliest next tokens there."""
    attention: Float[Array, "L PC G Q S"]
    """The attention of every position of the tails to the answer in its own fact; the sum of the
    probabilities of the answer's tokens."""


@partial(jax.jit, static_argnames="mesh")
def run_context(model: Model, example: Example, *, mesh: Mesh) -> KeysAndValues:
    """Returns the keys and values of a context, [L, T, PC, H], by full causal attention.

    Queries attend in blocks, so that the memory for attention follows the block.
    """
    run = jax.shard_map(
        _run_context_local,
        mesh=mesh,
        in_specs=(partition_specs(model), _WHOLE),
        out_specs=(_BY_SLOT, _BY_SLOT),
        check_vma=False,
    )
    return run(model, example.context)


def _run_context_local(model: Model, tokens: Int[Array, "T"]) -> KeysAndValues:
    """One device's part, inside `shard_map`."""
    block = min(len(tokens), KEY_BLOCK)
    starts = jnp.arange(0, len(tokens), block)

    def attend(q: Array, k: Array, v: Array, cache: None, layer: Array) -> tuple[Array, None, Any]:
        keys, values = k.swapaxes(0, 1), v.swapaxes(0, 1)

        def attend_block(block_of_queries: tuple[Array, Array]) -> Array:
            start, queries = block_of_queries
            return attend_to_prompt(queries, keys, values, start)

        blocks = q.reshape(len(starts), block, *q.shape[1:])
        return jax.lax.map(attend_block, (starts, blocks)).reshape(q.shape), cache, (k, v)

    layers = jnp.arange(model.config.num_layers)
    _, _, keys_and_values = model(tokens, jnp.arange(len(tokens)), attend, None, layers)
    return keys_and_values


@partial(jax.jit, static_argnames="mesh")
def answer(model: Model, example: Example, context: KeysAndValues, *, mesh: Mesh) -> Answers:
    """Runs an example's tails with full attention to the context."""

    def local(model: Model, example: Example, context: KeysAndValues) -> Answers:
        hidden, attention = _run_tails(model, example, context, _full_attention)
        return Answers(hidden, jnp.argmax(model.logits(hidden), -1), attention)

    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(partition_specs(model), _WHOLE, (_BY_SLOT, _BY_SLOT)),
        out_specs=Answers(_WHOLE, _WHOLE, LAYERS_BY_DEVICE),  # pyright: ignore[reportArgumentType]
        check_vma=False,
    )
    return run(model, example, context)


def gated_divergence(
    gates: Float[Array, "L K"],
    model: Model,
    example: Example,
    context: KeysAndValues,
    hidden: Float[Array, "R D"],
    is_kept: Bool[Array, "T"],
    head_of_slot: Int[Array, "L PC"],
    *,
    mesh: Mesh,
) -> Float[Array, ""]:
    """Returns the mean over answer tokens of KL(full || gated), differentiable in the gates.

    Args:
        hidden: `Answers.hidden` with full attention.
        is_kept: the tokens of the context that closed gates let through.
    """
    head = jnp.maximum(head_of_slot, 0)  # the outputs of empty slots are multiplied by zeros
    gates_by_slot = jnp.take_along_axis(gates, head, axis=1)

    def local(
        gates: Array, model: Model, example: Example, context: KeysAndValues, *fixed: Array
    ) -> Array:
        hidden, is_kept = fixed
        attention = jax.checkpoint(partial(_gated_attention, is_kept=is_kept))
        gated_hidden, _ = _run_tails(model, example, context, attention, gates)
        full = jax.nn.log_softmax(model.logits(hidden))
        gated = jax.nn.log_softmax(model.logits(gated_hidden))
        return jnp.sum(example.weights * jnp.sum(jnp.exp(full) * (full - gated), -1))

    # The gradient is taken outside of `shard_map`, which transposes its sums over devices.
    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(
            LAYERS_BY_DEVICE,
            partition_specs(model),
            _WHOLE,
            (_BY_SLOT, _BY_SLOT),
            _WHOLE,
            _WHOLE,
        ),
        out_specs=_WHOLE,
        check_vma=False,
    )
    return run(gates_by_slot, model, example, context, hidden, is_kept)


Probabilities = Callable[[Array, Array, Array], Array]
"""(logits [C,G,Q,S,T+S], which of the keys each query may see [S,T+S], the layer's gates [C])
-> probabilities in float32."""


def _run_tails(
    model: Model,
    example: Example,
    context: KeysAndValues,
    probabilities: Probabilities,
    gates: Float[Array, "L C"] | None = None,
) -> tuple[Float[Array, "R D"], Float[Array, "L C G Q S"]]:
    """Runs the tails inside `shard_map`: hidden states and attention, see `Answers`."""
    num_tails, size = example.tails.shape
    num_keys = context[0].shape[1]
    step = jnp.arange(size)
    is_context = jnp.broadcast_to(jnp.arange(num_keys) < example.length, (size, num_keys))
    is_seen = jnp.concatenate([is_context, step <= step[:, None]], axis=1)

    def attend(
        q: Array, k: Array, v: Array, cache: None, inputs: tuple[Array, Array, Array]
    ) -> tuple[Array, None, Array]:
        old_k, old_v, gate = inputs
        q, k, v = (x.reshape(num_tails, size, *x.shape[1:]) for x in (q, k, v))
        scores = jnp.concatenate(
            [_product("nscgh,tch->cgnst", q, old_k), _product("nscgh,nuch->cgnsu", q, k)], axis=-1
        )
        weights = probabilities(scores * q.shape[-1] ** -0.5, is_seen, gate)
        to_context, to_tail = weights[..., :num_keys], weights[..., num_keys:]
        out = _product("cgnst,tch->nscgh", to_context.astype(v.dtype), old_v)
        out += _product("cgnsu,nuch->nscgh", to_tail.astype(v.dtype), v)
        to_fact = _product("cgnst,nt->cgns", to_context, example.is_fact.astype(jnp.float32))
        return out.reshape(num_tails * size, *out.shape[2:]), cache, to_fact

    if gates is None:
        gates = jnp.ones((model.config.num_layers, model.slots_per_device))
    hidden, _, attention = model(
        example.tails.reshape(-1),
        jnp.tile(example.length + step, num_tails),
        attend,
        None,
        (*context, gates),
    )
    return hidden[example.predicts], attention


def _full_attention(
    scores: Float[Array, "C G Q S keys"], is_seen: Bool[Array, "S keys"], gate: Float[Array, "C"]
) -> Float[Array, "C G Q S keys"]:
    return jax.nn.softmax(jnp.where(is_seen, scores, -jnp.inf), axis=-1)


def _gated_attention(
    scores: Float[Array, "C G Q S keys"],
    is_seen: Bool[Array, "S keys"],
    gate: Float[Array, "C"],
    *,
    is_kept: Bool[Array, "T"],
) -> Float[Array, "C G Q S keys"]:
    """Mixes attention to all that is seen with attention to what is kept, by each head's gate.

    The outputs of the two attentions mix like their probabilities, since values multiply both.
    """
    of_tail = jnp.ones(is_seen.shape[1] - len(is_kept), bool)
    is_kept_or_tail = is_seen & jnp.concatenate([is_kept, of_tail])
    weight = gate[:, None, None, None, None]
    full = _full_attention(scores, is_seen, gate)
    kept = _full_attention(scores, is_kept_or_tail, gate)
    return weight * full + (1 - weight) * kept


def _product(subscripts: str, left: Array, right: Array) -> Array:
    return jnp.einsum(subscripts, left, right, preferred_element_type=jnp.float32)
