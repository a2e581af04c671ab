"""Loads, stores and launches of kernels that are lowered through Triton."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array

from fairkv_jax.shapes import next_power_of_two


def launch(
    kernel: Any,
    name: str,
    programs: int,
    outputs: tuple[jax.ShapeDtypeStruct, ...],
    *,
    num_warps: int = 4,
    num_stages: int = 1,
    **options: Any,
) -> Any:
    """Returns a call of a kernel that takes whole arrays and indexes them itself."""
    return pl.pallas_call(
        kernel,
        out_shape=outputs,
        grid=(programs,),
        compiler_params=plt.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        name=name,
        **options,
    )


def load(ref: Any, rows: Array, mask: Array, head_dim: int) -> Array:
    """ref[rows], with zeros where the mask is false and in padded columns."""
    at, mask = _columns(ref, rows, mask, head_dim)
    return plt.load(at, mask=mask, other=0)


def store(ref: Any, rows: Array, value: Array, mask: Array, head_dim: int) -> None:
    """ref[rows] = value where the mask is true."""
    at, mask = _columns(ref, rows, mask, head_dim)
    plt.store(at, value, mask=mask)


def _columns(ref: Any, rows: Array, mask: Array, head_dim: int) -> tuple[Any, Array]:
    """Rows with all their columns, padded to a power of 2, which Triton's blocks must be."""
    shape = (*rows.shape, next_power_of_two(head_dim))
    column = jnp.broadcast_to(jnp.arange(shape[-1]), shape)
    mask = jnp.broadcast_to(mask[..., None], shape)
    if shape[-1] > head_dim:
        mask &= column < head_dim
    return ref.at[jnp.broadcast_to(rows[..., None], shape), column], mask


def ceil_div(a: Array, b: Array | int) -> Array:
    b = jnp.asarray(b, jnp.int32)
    return jax.lax.div(a + b - 1, jnp.broadcast_to(b, jnp.shape(a)))
