"""Weights in int8 with one scale for each output channel, as one pytree.

Weights are int8 to save memory; products are computed in the activations' type.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fairkv_jax.models.params import ArraySpec


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedArray:
    """An int8 matrix; its values are `values` times the scale of their output channel.

    The leaves need not be arrays: trees of partitions or of shards have the same structure.
    """

    values: Any
    """int8, over all axes."""
    scales: Any
    """float32, over the output axes."""


Weights = Array | QuantizedArray


def make_param(
    array: ArraySpec, shape: tuple[int, ...], dtype: jnp.dtype, *, int8: bool
) -> nnx.Param:
    """A parameter of zeros with its logical axes; matrices are `QuantizedArray` with `int8`."""
    if not (int8 and array.outputs):
        return nnx.Param(jnp.zeros(shape, dtype), axes=array.axes)
    sizes = dict(zip(array.axes, shape, strict=True))
    scales = jnp.zeros([sizes[axis] for axis in array.outputs], jnp.float32)
    value = QuantizedArray(jnp.zeros(shape, jnp.int8), scales)
    return nnx.Param(value, axes=array.axes, output_axes=array.outputs)


def dequantize(weights: Weights) -> Float[Array, "*axes"]:
    """The values of a matrix whose scales are over its last axes."""
    if isinstance(weights, QuantizedArray):
        return weights.values * weights.scales
    return weights


def multiply(x: Float[Array, "tokens inputs"], weights: Weights) -> Float[Array, "tokens outputs"]:
    """x times weights [*inputs, *outputs], both flattened.

    The product is one flat matrix product, because XLA's CPU backend copies the operands of a
    batched one.
    """
    if not isinstance(weights, QuantizedArray):
        return x @ weights.reshape(x.shape[-1], -1).astype(x.dtype)
    out = x @ weights.values.reshape(x.shape[-1], -1).astype(x.dtype)
    return (out * weights.scales.reshape(-1)).astype(x.dtype)


def lookup(table: Weights, rows: Array, dtype: jnp.dtype) -> Float[Array, "tokens D"]:
    """Rows of a table [V, D] in the given type."""
    if not isinstance(table, QuantizedArray):
        return table[rows].astype(dtype)
    return table.values[rows].astype(dtype) * table.scales[rows, None].astype(dtype)


def multiply_by_rows(x: Float[Array, "tokens D"], table: Weights) -> Float[Array, "tokens V"]:
    """The float32 products of x with every row of a table [V, D]."""
    if not isinstance(table, QuantizedArray):
        return (x @ table.T.astype(x.dtype)).astype(jnp.float32)
    return (x @ table.values.T.astype(x.dtype)).astype(jnp.float32) * table.scales
