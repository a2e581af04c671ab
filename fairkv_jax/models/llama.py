"""The Llama family as Flax modules, one model for prefill and decode.

Its relatives differ in what their configuration says: the width of a head, biases of queries, keys
and values, norms of query and key heads, divided rotary frequencies, tied embeddings.

The modules run inside `shard_map`: every device holds C head slots of each layer, an even part of
the MLP and of the vocabulary, and sees all tokens. Attention is injected; it is called once per
layer with the slots' queries, keys and values, and threads a cache of its own through the layers.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fairkv_jax.config import ModelConfig
from fairkv_jax.models.rope import rope_angles, rotate
from fairkv_jax.models.weights import Precision, multiply
from fairkv_jax.shapes import TENSOR_AXIS

Attend = Callable[[Array, Array, Array, Any, Any], tuple[Array, Any, Any]]
"""(q [tokens,C,G,H], k, v [tokens,C,H], cache, this layer's inputs) -> (out, cache, outputs)."""


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation (Zhang and Sennrich, 2019), computed in float32."""

    def __init__(self, width: int, eps: float, dtype: jnp.dtype, axis: str = "model"):
        self.eps = eps
        self.scale = nnx.Param(jnp.zeros(width, dtype), axes=(axis,))

    def __call__(self, x: Float[Array, "*axes width"]) -> Float[Array, "*axes width"]:
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + self.eps)
        return (wide * self.scale[...]).astype(x.dtype)


class Attention(nnx.Module):
    """Projections of the local head slots: a slot is one KV head with its G query heads.

    `qkv` stacks, for every slot, its G query heads, its key head and its value head; the biases,
    where the model has them, alike. What is multiplied has its contracted axes first: XLA's CPU
    backend is a quarter slower at the transposed product of a small batch.
    """

    def __init__(self, config: ModelConfig, slots: int, precision: Precision):
        dtype = precision.dtype
        group, width, model = config.group_size, config.head_dim, config.hidden_size
        heads = ("slot", None, "head_dim")
        qkv, out = (model, slots, group + 2, width), (slots, group, width, model)
        self.qkv = precision.weights(qkv, ("model", *heads))
        self.qkv_scales = precision.scales(qkv[1:], heads)
        self.out = precision.weights(out, (*heads, "model"))
        self.out_scales = precision.scales(out[-1:], ("model",))
        bias = jnp.zeros(qkv[1:], dtype)
        self.bias = nnx.Param(bias, axes=heads) if config.qkv_bias else None
        norm = partial(RMSNorm, width, config.rms_norm_eps, dtype, "head_dim")
        self.q_norm = norm() if config.qk_norm else None
        self.k_norm = norm() if config.qk_norm else None

    def project(
        self, x: Float[Array, "tokens D"], angles: Float[Array, "tokens half"]
    ) -> tuple[Array, Array, Array]:
        """Rotated q [tokens, C, G, H] and k [tokens, C, H], and v [tokens, C, H]."""
        _, slots, heads, width = self.qkv[...].shape
        qkv = multiply(x, self.qkv, self.qkv_scales).reshape(-1, slots, heads, width)
        if self.bias is not None:
            qkv += self.bias[...]
        qk, v = qkv[:, :, :-1], qkv[:, :, -1]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(qk[:, :, :-1]), self.k_norm(qk[:, :, -1:])
            qk = jnp.concatenate([q, k], axis=2)
        qk = rotate(qk.reshape(-1, slots * (heads - 1), width), angles)
        qk = qk.reshape(-1, slots, heads - 1, width)
        return qk[:, :, :-1], qk[:, :, -1], v

    def merge(self, out: Float[Array, "tokens C G H"]) -> Float[Array, "tokens D"]:
        """This device's part of the output projection; empty slots have zero weights."""
        return multiply(out.reshape(len(out), -1), self.out, self.out_scales)


class MLP(nnx.Module):
    """The gated MLP, SwiGLU (Shazeer, 2020)."""

    def __init__(self, config: ModelConfig, width: int, precision: Precision):
        model = config.hidden_size
        self.gate = precision.weights((model, width), ("model", "mlp"))
        self.gate_scales = precision.scales((width,), ("mlp",))
        self.up = precision.weights((model, width), ("model", "mlp"))
        self.up_scales = precision.scales((width,), ("mlp",))
        self.down = precision.weights((width, model), ("mlp", "model"))
        self.down_scales = precision.scales((model,), ("model",))

    def __call__(self, x: Float[Array, "tokens D"]) -> Float[Array, "tokens D"]:
        """This device's part of the sum."""
        gate = multiply(x, self.gate, self.gate_scales)
        up = multiply(x, self.up, self.up_scales)
        return multiply(jax.nn.silu(gate) * up, self.down, self.down_scales)


class DecoderLayer(nnx.Module):
    """Attention and MLP, each behind a norm and summed over the devices."""

    def __init__(self, config: ModelConfig, slots: int, mlp_width: int, precision: Precision):
        norm = partial(RMSNorm, config.hidden_size, config.rms_norm_eps, precision.dtype)
        self.attn_norm = norm()
        self.attention = Attention(config, slots, precision)
        self.mlp_norm = norm()
        self.mlp = MLP(config, mlp_width, precision)

    def __call__(
        self, x: Array, angles: Array, attend: Attend, cache: Any, inputs: Any
    ) -> tuple[Array, Any, Any]:
        q, k, v = self.attention.project(self.attn_norm(x), angles)
        out, cache, outputs = attend(q, k, v, cache, inputs)
        x = x + jax.lax.psum(self.attention.merge(out.astype(x.dtype)), TENSOR_AXIS)
        x = x + jax.lax.psum(self.mlp(self.mlp_norm(x)), TENSOR_AXIS)
        return x, cache, outputs


class Llama(nnx.Module):
    """A Llama decoder over `slots` head slots in all, C on each of P devices.

    Made under `nnx.eval_shape`: the parameters get their values from a checkpoint. With `int8` all
    matrices are int8, with a scale for each channel that they put out, or token of the embedding.
    """

    def __init__(
        self,
        config: ModelConfig,
        slots: int,
        num_devices: int,
        dtype: jnp.dtype,
        *,
        int8: bool = False,
    ):
        self.config, self.dtype = config, dtype
        precision = Precision(dtype, int8)
        mlp_width = round_up(config.intermediate_size, num_devices)
        vocab = round_up(config.vocab_size, num_devices)
        shape, axes = (vocab, config.hidden_size), ("vocab", "model")
        self.embed = precision.weights(shape, axes)
        self.embed_scales = precision.scales((vocab,), ("vocab",))
        self.layers = nnx.vmap(
            lambda _layer: DecoderLayer(config, slots, mlp_width, precision),
            axis_size=config.num_layers,
        )(jnp.zeros(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        if not config.tie_word_embeddings:
            self.unembed = precision.weights(shape, axes)
            self.unembed_scales = precision.scales((vocab,), ("vocab",))

    def __call__(
        self,
        tokens: Int[Array, "tokens"],
        positions: Int[Array, "tokens"],
        attend: Attend,
        cache: Any,
        inputs: Any,
    ) -> tuple[Float[Array, "tokens D"], Any, Any]:
        """Hidden states before the last norm, the cache, and attention's outputs stacked by layer.

        `inputs` is a pytree of arrays with a leading layer axis; attention gets its layer's part.
        """
        angles = self.angles(positions)

        def run_layer(
            carry: tuple[Array, Any], xs: tuple[DecoderLayer, Any]
        ) -> tuple[tuple[Array, Any], Any]:
            x, cache = carry
            layer, inputs = xs
            x, cache, outputs = layer(x, angles, attend, cache, inputs)
            return (x, cache), outputs

        carry = (self.embedded(tokens), cache)
        (x, cache), outputs = jax.lax.scan(run_layer, carry, (self.layers, inputs))
        return x, cache, outputs

    def angles(self, positions: Int[Array, "tokens"]) -> Float[Array, "tokens half"]:
        """The rotary angles of queries and keys at these positions."""
        return rope_angles(positions, self.config)

    def layer(self, index: Int[Array, ""]) -> DecoderLayer:
        """One layer of the stack."""
        return jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), self.layers
        )

    def embedded(self, tokens: Int[Array, "tokens"]) -> Float[Array, "tokens D"]:
        """Looks tokens up in this device's part of the vocabulary, and sums over the devices."""
        rows = self.embed[...].shape[0]
        local = tokens - jax.lax.axis_index(TENSOR_AXIS) * rows
        is_here = (local >= 0) & (local < rows)
        local = jnp.clip(local, 0, rows - 1)
        found = self.embed[...][local].astype(self.dtype)
        if self.embed_scales is not None:
            found *= self.embed_scales[...][local, None].astype(self.dtype)
        return jax.lax.psum(jnp.where(is_here[:, None], found, 0), TENSOR_AXIS)

    def logits(self, x: Float[Array, "tokens D"]) -> Float[Array, "tokens V"]:
        """Next-token logits in float32, on every device."""
        tied = self.config.tie_word_embeddings
        unembed = self.embed if tied else self.unembed
        scales = self.embed_scales if tied else self.unembed_scales
        local = (self.norm(x) @ unembed[...].T.astype(x.dtype)).astype(jnp.float32)
        local = local if scales is None else local * scales[...]
        full = jax.lax.all_gather(local, TENSOR_AXIS, axis=1, tiled=True)
        return full[:, : self.config.vocab_size]


def round_up(size: int, multiple: int) -> int:
    """The least multiple that is no smaller: an axis padded so that it splits evenly."""
    return -(-size // multiple) * multiple
