"""Rotary position embeddings (Su et al., 2021) in the rotate-half convention."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rope_angles(
    positions: Int[Array, "tokens"], head_dim: int, theta: float
) -> Float[Array, "tokens half"]:
    """Angles in radians: position / theta**(2i/H) for the H/2 pairs of a head."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    return positions[:, None].astype(jnp.float32) * frequencies


def rotate(
    x: Float[Array, "tokens heads H"], angles: Float[Array, "tokens half"]
) -> Float[Array, "tokens heads H"]:
    """Turns the pairs (x[i], x[i + H/2]) by the token's angles."""
    cos = jnp.cos(angles)[:, None]
    sin = jnp.sin(angles)[:, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.astype(x.dtype)
