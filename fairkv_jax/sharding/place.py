"""Weights from a checkpoint, in head order, to the devices, in slot order."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from fairkv_jax.checkpoint import Checkpoint
from fairkv_jax.models import Llama
from fairkv_jax.sharding.mesh import spec
from fairkv_jax.sharding.slots import SlotLayout


def abstract_model(checkpoint: Checkpoint, layout: SlotLayout, dtype: str) -> Llama:
    """The model with shapes in place of arrays."""
    return nnx.eval_shape(
        lambda: Llama(checkpoint.config, layout.num_slots, layout.num_devices, jnp.dtype(dtype))
    )


def partition_specs(model: Llama) -> Llama:
    """The partition of every parameter, by its logical axes; leading layer axes are not split."""

    def partition(variable: nnx.Variable) -> nnx.Variable:
        stacked = (None,) * (len(variable.get_value().shape) - len(variable.axes))
        return variable.replace(PartitionSpec(*stacked, *spec(*variable.axes)))

    return jax.tree.map(partition, model, is_leaf=lambda x: isinstance(x, nnx.Variable))


def load_model(
    checkpoint: Checkpoint, layout: SlotLayout, mesh: Mesh, dtype: str, *, progress: bool = True
) -> Llama:
    """Reads the checkpoint tensor by tensor straight into the sharded parameters.

    Never more than one layer's tensor is held on the host beside what the devices hold.
    """
    shapes = abstract_model(checkpoint, layout, dtype)
    model = jax.tree.map(
        lambda p, s: _zeros(p, NamedSharding(mesh, s)), shapes, partition_specs(shapes)
    )
    total = len(jax.tree.leaves(shapes.layers)) * checkpoint.config.num_layers
    total += 3 - checkpoint.config.tie_word_embeddings
    tensors = _tensors(model, checkpoint, layout)
    for param, layer, value in tqdm(tensors, "loading", total, disable=not progress):
        param.set_value(_put(param.get_value(), value, layer))
    return model


def _tensors(
    model: Llama, checkpoint: Checkpoint, layout: SlotLayout
) -> Iterator[tuple[nnx.Param, int | None, np.ndarray]]:
    """(parameter, its layer, the value in slot order) for the whole checkpoint."""
    yield model.embed, None, checkpoint.tensor("embed")
    yield model.norm.scale, None, checkpoint.tensor("norm")
    if not checkpoint.config.tie_word_embeddings:
        yield model.unembed, None, checkpoint.tensor("unembed")
    layers = model.layers
    for layer in range(checkpoint.config.num_layers):

        def read(name: str, layer: int = layer) -> np.ndarray:
            return checkpoint.tensor(f"layers.{layer}.{name}")

        def stacked(q: str, k: str, v: str, layer: int = layer) -> np.ndarray:
            heads = [read(q), read(k)[:, None], read(v)[:, None]]
            return layout.to_slots(np.concatenate(heads, axis=1), layer)

        attention = layers.attention
        yield attention.qkv, layer, np.moveaxis(stacked("q", "k", "v"), -1, 0)
        yield attention.out, layer, layout.to_slots(read("o"), layer)
        if attention.bias is not None:
            yield attention.bias, layer, stacked("q_bias", "k_bias", "v_bias")
        if attention.q_norm is not None and attention.k_norm is not None:
            yield attention.q_norm.scale, layer, read("q_norm")
            yield attention.k_norm.scale, layer, read("k_norm")
        yield layers.attn_norm.scale, layer, read("attn_norm")
        yield layers.mlp_norm.scale, layer, read("mlp_norm")
        yield layers.mlp.gate, layer, read("gate").T
        yield layers.mlp.up, layer, read("up").T
        yield layers.mlp.down, layer, read("down")


def _zeros(shape: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.Array:
    return jax.jit(lambda: jnp.zeros(shape.shape, shape.dtype), out_shardings=sharding)()


def _put(param: jax.Array, value: np.ndarray, layer: int | None) -> jax.Array:
    """Writes a tensor, padded with zeros to the parameter's shape, into its layer in place."""
    shape = param.shape if layer is None else param.shape[1:]
    padding = [(0, to - size) for to, size in zip(shape, value.shape, strict=True)]
    value = np.pad(value, padding).astype(param.dtype)
    if layer is None:
        return jax.device_put(value, param.sharding)
    assert isinstance(param.sharding, NamedSharding)
    inner = NamedSharding(param.sharding.mesh, PartitionSpec(*param.sharding.spec[1:]))
    return _write_layer(param, jax.device_put(value, inner), layer)


@jax.jit(donate_argnums=0)
def _write_layer(stack: jax.Array, value: jax.Array, layer: int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, value, layer, 0)
