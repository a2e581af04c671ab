"""The decoder as Flax modules, one model for prefill and decode.

The families that run here share Llama's structure. They differ in what `ModelConfig` says: the head
dimension, biases of queries, keys and values, norms of query and key heads, the activation, the
offset of norms, scaled embeddings, divided rotary frequencies, tied embeddings.

The modules run inside `shard_map`. Attention is injected: the model calls it once per layer with
the queries, keys and values of the local head slots, and threads a cache through the layers that
only attention reads. Arrays are made from the model's `ParamSpec`s.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fairkv_jax.config import ModelConfig
from fairkv_jax.models.model import Attend, Model
from fairkv_jax.models.params import array_specs, param_specs
from fairkv_jax.models.quantized import dequantize, lookup, make_param, multiply, multiply_by_rows
from fairkv_jax.models.rope import rope_angles, rotate
from fairkv_jax.shapes import TENSOR_AXIS

MakeParam = Callable[[str], nnx.Param]
"""Makes the parameter of a path."""

_ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": partial(jax.nn.gelu, approximate=True)}


class RMSNorm(nnx.Module):
    """Root-mean-square normalization (Zhang and Sennrich, 2019), computed in float32."""

    def __init__(self, config: ModelConfig, scale: nnx.Param):
        self.eps, self.offset = config.rms_norm_eps, config.norm_offset
        self.scale = scale

    def __call__(self, x: Float[Array, "*axes size"]) -> Float[Array, "*axes size"]:
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + self.eps)
        scale = self.scale[...]
        if self.offset:
            scale = self.offset + scale.astype(jnp.float32)
        return (wide * scale).astype(x.dtype)


class Attention(nnx.Module):
    """Projections of the local head slots; a slot is one KV head with its G query heads.

    `qkv` stacks the G query heads, the key head and the value head of every slot; `bias`, in models
    that have it, has the same order.
    """

    def __init__(self, config: ModelConfig, make: MakeParam):
        self.qkv = make("layers.attention.qkv")
        self.out = make("layers.attention.out")
        self.bias = make("layers.attention.bias") if config.qkv_bias else None
        q_norm, k_norm = "layers.attention.q_norm.scale", "layers.attention.k_norm.scale"
        self.q_norm = RMSNorm(config, make(q_norm)) if config.qk_norm else None
        self.k_norm = RMSNorm(config, make(k_norm)) if config.qk_norm else None
        self.group_size, self.head_dim = config.group_size, config.head_dim

    def project(
        self, x: Float[Array, "tokens D"], angles: Float[Array, "tokens half"]
    ) -> tuple[Array, Array, Array]:
        """Rotated q [tokens, C, G, H] and k [tokens, C, H], and v [tokens, C, H]."""
        heads, head_dim = self.group_size + 2, self.head_dim
        qkv = multiply(x, self.qkv.get_value())
        qkv = qkv.reshape(len(x), -1, heads, head_dim)
        slots = qkv.shape[1]
        if self.bias is not None:
            qkv += self.bias[...]
        qk, v = qkv[:, :, :-1], qkv[:, :, -1]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(qk[:, :, :-1]), self.k_norm(qk[:, :, -1:])
            qk = jnp.concatenate([q, k], axis=2)
        qk = rotate(qk.reshape(-1, slots * (heads - 1), head_dim), angles)
        qk = qk.reshape(-1, slots, heads - 1, head_dim)
        return qk[:, :, :-1], qk[:, :, -1], v

    def merge(self, out: Float[Array, "tokens C G H"]) -> Float[Array, "tokens D"]:
        """This device's part of the output projection; empty slots have zero weights."""
        return multiply(out.reshape(len(out), -1), self.out.get_value())


class MLP(nnx.Module):
    """The gated MLP (Shazeer, 2020): SwiGLU or GEGLU.

    `gate_up` [D, 2, F] holds the gate and the up projection.
    """

    def __init__(self, config: ModelConfig, make: MakeParam):
        self.gate_up, self.down = make("layers.mlp.gate_up"), make("layers.mlp.down")
        self.activation = config.activation

    def __call__(self, x: Float[Array, "tokens D"]) -> Float[Array, "tokens D"]:
        """This device's part of the output, to be summed over the devices."""
        gate, up = jnp.split(multiply(x, self.gate_up.get_value()), 2, axis=-1)
        return multiply(_ACTIVATIONS[self.activation](gate) * up, self.down.get_value())


class DecoderLayer(nnx.Module):
    """Attention and MLP, each after a norm; both are summed over the devices."""

    def __init__(self, config: ModelConfig, make: MakeParam):
        self.attn_norm = RMSNorm(config, make("layers.attn_norm.scale"))
        self.attention = Attention(config, make)
        self.mlp_norm = RMSNorm(config, make("layers.mlp_norm.scale"))
        self.mlp = MLP(config, make)

    def __call__(
        self, x: Array, angles: Array, attend: Attend, cache: Any, inputs: Any
    ) -> tuple[Array, Any, Any]:
        q, k, v = self.attention.project(self.attn_norm(x), angles)
        out, cache, outputs = attend(q, k, v, cache, inputs)
        x = x + jax.lax.psum(self.attention.merge(out.astype(x.dtype)), TENSOR_AXIS)
        x = x + jax.lax.psum(self.mlp(self.mlp_norm(x)), TENSOR_AXIS)
        return x, cache, outputs

    def attention_inputs(self, x: Float[Array, "tokens D"]) -> Float[Array, "tokens D"]:
        """The normalized hidden states that queries, keys and values are projected from."""
        return self.attn_norm(x)

    def output_weights(self) -> Float[Array, "C G H D"]:
        """The output projection of this device's head slots."""
        return dequantize(self.attention.out.get_value())


class Decoder(nnx.Module):
    """A decoder with `num_slots` head slots per layer, C on each of P devices; see `Model`.

    It is made under `nnx.eval_shape`: a checkpoint gives the parameters their values. With `int8`
    all matrices are `QuantizedArray`s.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_slots: int,
        num_devices: int,
        dtype: jnp.dtype,
        *,
        int8: bool = False,
    ):
        self.config, self.dtype = config, dtype
        arrays = array_specs(param_specs(config).values())

        def make(path: str) -> nnx.Param:
            shape = arrays[path].padded_shape(num_slots, num_devices)
            return make_param(arrays[path], shape, dtype, int8=int8)

        self.embed = make("embed")
        self.layers = nnx.vmap(
            lambda _layer: DecoderLayer(config, make), axis_size=config.num_layers
        )(jnp.zeros(config.num_layers))
        self.norm = RMSNorm(config, make("norm.scale"))
        self.lm_head = None if config.tie_word_embeddings else make("lm_head")

    @property
    def slots_per_device(self) -> int:
        """Head slots of one layer on this device (C)."""
        qkv = jax.tree.leaves(self.layers.attention.qkv)[0]
        return qkv.shape[2]

    def __call__(
        self,
        tokens: Int[Array, "tokens"],
        positions: Int[Array, "tokens"],
        attend: Attend,
        cache: Any,
        inputs: Any,
    ) -> tuple[Float[Array, "tokens D"], Any, Any]:
        """Hidden states before the last norm, the cache, and attention's outputs by layer."""
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
        table = self.embed.get_value()
        num_rows = jax.tree.leaves(table)[0].shape[0]
        local = tokens - jax.lax.axis_index(TENSOR_AXIS) * num_rows
        is_here = (local >= 0) & (local < num_rows)
        found = lookup(table, jnp.clip(local, 0, num_rows - 1), self.dtype)
        x = jax.lax.psum(jnp.where(is_here[:, None], found, 0), TENSOR_AXIS)
        if self.config.scale_embeddings:
            # The factor is rounded to the model's type first, as in the published code.
            x *= jnp.asarray(self.config.hidden_size**0.5, self.dtype)
        return x

    def logits(self, x: Float[Array, "tokens D"]) -> Float[Array, "tokens V"]:
        """Next-token logits in float32, on every device."""
        table = self.embed if self.lm_head is None else self.lm_head
        local = multiply_by_rows(self.norm(x), table.get_value())
        full = jax.lax.all_gather(local, TENSOR_AXIS, axis=1, tiled=True)
        return full[:, : self.config.vocab_size]


def abstract_model(
    config: ModelConfig, num_slots: int, num_devices: int, dtype: str, *, int8: bool = False
) -> Model:
    """The model of a configuration, with shapes in place of arrays.

    `num_slots` counts the head slots of a layer over all devices (P*C).
    """
    return nnx.eval_shape(
        lambda: Decoder(config, num_slots, num_devices, jnp.dtype(dtype), int8=int8)
    )
