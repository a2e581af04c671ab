"""Weight matrices in floats, or in int8 with a scale for each channel that they put out.

Weights are int8 where memory is scarce: the products stay those of the activations' type.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

Axes = tuple[str | None, ...]


@dataclass(frozen=True)
class Precision:
    """The type of activations and weights; with `int8`, matrices are int8 and have scales."""

    dtype: jnp.dtype
    int8: bool = False

    def weights(self, shape: tuple[int, ...], axes: Axes) -> nnx.Param:
        return nnx.Param(jnp.zeros(shape, jnp.int8 if self.int8 else self.dtype), axes=axes)

    def scales(self, shape: tuple[int, ...], axes: Axes) -> nnx.Param | None:
        """Float32: a value of the matrix is its int8 times its channel's scale."""
        return nnx.Param(jnp.zeros(shape, jnp.float32), axes=axes) if self.int8 else None


def multiply(
    x: Float[Array, "tokens inputs"], weights: nnx.Param, scales: nnx.Param | None
) -> Float[Array, "tokens outputs"]:
    """x times weights [*inputs, *outputs], both flattened; the scales are over the outputs.

    As one flat product, because XLA's CPU backend copies the operands of a batched one.
    """
    out = x @ weights[...].reshape(x.shape[-1], -1).astype(x.dtype)
    return out if scales is None else (out * scales[...].reshape(-1)).astype(x.dtype)
