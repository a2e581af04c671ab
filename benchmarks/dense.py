"""The dense baseline of the benchmarks: contiguous caches without pages or routing.

It uses the same model and weights on the same mesh. Each layer has one array of keys and one of
values, in which all rows have the same length.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from fairkv_jax.models.model import Model
from fairkv_jax.shapes import TENSOR_AXIS
from fairkv_jax.sharding.load_weights import partition_specs

_BY_SLOT = PartitionSpec(None, TENSOR_AXIS)
_WHOLE = PartitionSpec()
Caches = tuple[Float[Array, "L C B S H"], Float[Array, "L C B S H"]]


@partial(jax.jit, static_argnames="mesh", donate_argnums=1)
def dense_step(
    model: Model, caches: Caches, tokens: Int[Array, "B"], position: Int[Array, ""], *, mesh: Mesh
) -> tuple[Caches, Int[Array, "B"]]:
    """Runs one greedy decode step with all rows at `position` of caches [L, P*C, B, S, H]."""

    def local(model: Model, caches: Caches, tokens: Array, position: Array) -> tuple[Caches, Array]:
        def attend(
            q: Array, k: Array, v: Array, caches: Caches, layer: Array
        ) -> tuple[Array, Caches, None]:
            keys = caches[0].at[layer, :, :, position].set(k.swapaxes(0, 1))
            values = caches[1].at[layer, :, :, position].set(v.swapaxes(0, 1))
            scores = jnp.einsum("bcgh,cbsh->cbgs", q, keys[layer]) * q.shape[-1] ** -0.5
            is_past = jnp.arange(keys.shape[3]) <= position
            weights = jax.nn.softmax(jnp.where(is_past, scores, -jnp.inf), axis=-1)
            return jnp.einsum("cbgs,cbsh->bcgh", weights, values[layer]), (keys, values), None

        layers = jnp.arange(model.config.num_layers)
        positions = jnp.full(tokens.shape, position)
        x, caches, _ = model(tokens, positions, attend, caches, layers)
        return caches, jnp.argmax(model.logits(x), -1)

    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(partition_specs(model), _BY_SLOT, _WHOLE, _WHOLE),
        out_specs=(_BY_SLOT, _WHOLE),
        check_vma=False,
    )
    return run(model, caches, tokens, position)


@partial(jax.jit, static_argnames="mesh")
def dense_prefill(
    model: Model, tokens: Int[Array, "T"], *, mesh: Mesh
) -> tuple[Float[Array, "V"], Array, Array]:
    """Returns the last token's logits, and keys and values [L, T, P*C, H].

    The attention scores [T, T] are computed at once.
    """

    def local(model: Model, tokens: Array) -> tuple[Array, Array, Array]:
        def attend(
            q: Array, k: Array, v: Array, cache: None, layer: None
        ) -> tuple[Array, None, tuple[Array, Array]]:
            scores = jnp.einsum("tcgh,sch->cgts", q, k) * q.shape[-1] ** -0.5
            scores = jnp.where(jnp.tri(len(q), dtype=bool), scores, -jnp.inf)
            weights = jax.nn.softmax(scores, axis=-1)
            return jnp.einsum("cgts,sch->tcgh", weights, v), cache, (k, v)

        x, _, (keys, values) = model(tokens, jnp.arange(len(tokens)), attend, None, None)
        return model.logits(x[-1:])[0], keys, values

    by_slot = PartitionSpec(None, None, TENSOR_AXIS)
    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(partition_specs(model), _WHOLE),
        out_specs=(_WHOLE, by_slot, by_slot),
        check_vma=False,
    )
    return run(model, tokens)
