"""Blocks of rows in kernels lowered through Triton, and how such kernels are launched."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array


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
    """A kernel over whole arrays, which it indexes itself."""
    return pl.pallas_call(
        kernel,
        out_shape=outputs,
        grid=(programs,),
        compiler_params=plt.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        name=name,
        **options,
    )


def load(ref: Any, rows: Array, mask: Array, width: int) -> Array:
    """ref[rows], zeros where the mask is false or a padded column lies."""
    at, mask = _columns(ref, rows, mask, width)
    return plt.load(at, mask=mask, other=0)


def store(ref: Any, rows: Array, value: Array, mask: Array, width: int) -> None:
    at, mask = _columns(ref, rows, mask, width)
    plt.store(at, value, mask=mask)


def _columns(ref: Any, rows: Array, mask: Array, width: int) -> tuple[Any, Array]:
    """Rows with all their columns; Triton's blocks are powers of 2, so a width of 96 takes 128."""
    shape = (*rows.shape, power_of_two(width))
    column = jnp.broadcast_to(jnp.arange(shape[-1]), shape)
    mask = jnp.broadcast_to(mask[..., None], shape)
    if shape[-1] > width:
        mask &= column < width
    return ref.at[jnp.broadcast_to(rows[..., None], shape), column], mask


def ceil_div(a: Array, b: Array | int) -> Array:
    b = jnp.asarray(b, jnp.int32)
    return jax.lax.div(a + b - 1, jnp.broadcast_to(b, jnp.shape(a)))


def power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
