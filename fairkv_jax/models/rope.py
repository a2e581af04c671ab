"""Rotary position embeddings (Su et al., 2021) in the rotate-half convention."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fairkv_jax.config import ModelConfig


def rope_angles(
    positions: Int[Array, "tokens"], config: ModelConfig
) -> Float[Array, "tokens half"]:
    """Angles in radians: position / theta**(2i/H) for the H/2 pairs of a head.

    The frequencies are divided by `config.rope_divisors` if the model has them (Llama 3.1).
    """
    frequencies = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    if config.rope_divisors is not None:
        frequencies /= np.array(config.rope_divisors)
    return positions[:, None].astype(jnp.float32) * frequencies.astype(np.float32)


def rotate(
    x: Float[Array, "tokens heads H"], angles: Float[Array, "tokens half"]
) -> Float[Array, "tokens heads H"]:
    """Rotates the pairs (x[i], x[i + H/2]) by the angles of each token."""
    cos = jnp.cos(angles)[:, None]
    sin = jnp.sin(angles)[:, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.astype(x.dtype)
