"""One device's share of a decode step: its attention layers, and what is split evenly."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Lowered

from benchmarks.gpu_suite.inputs import CacheShape, drawn, page_table
from benchmarks.gpu_suite.programs import seconds_of
from fairkv_jax.pallas.ragged_decode import AUTO, Device, Pool, append_and_decode
from fairkv_jax.plan import ModelShape

DTYPE = "bfloat16"


def lower_attention(shape: ModelShape, device: Device, lengths: np.ndarray) -> Lowered:
    """Lowers norm, projections, attention with append, and output projection of all layers."""
    num_layers, batch, slots = lengths.shape
    group, width = shape.num_heads // shape.num_kv_heads, shape.head_dim
    cache = CacheShape.of(lengths, room=1)
    pages: Any = cache.pages(width, DTYPE)

    def step(x: Any, pool: Any, qkv: Any, out: Any, table: Any, lengths: Any) -> Any:
        def layer(carry: Any, inputs: Any) -> tuple[Any, None]:
            x, pool = carry
            qkv, out, index = inputs
            heads = (_normed(x) @ qkv.T).reshape(batch, slots, group + 2, width)
            q, k, v = heads[:, :, :group], heads[:, :, group], heads[:, :, group + 1]
            new = q[:, None], k[:, None], v[:, None]
            lists = table, lengths, index
            o, pool = append_and_decode(*new, pool, *lists, backend=AUTO, device=device)
            x = x + o.astype(x.dtype).reshape(batch, -1) @ out
            return (x, pool), None

        return jax.lax.scan(layer, (x, pool), (qkv, out, jnp.arange(num_layers)))[0]

    weights = (jax.ShapeDtypeStruct(each, DTYPE) for each in _attention_weights(shape, lengths))
    return jax.jit(step, donate_argnums=1).lower(
        jax.ShapeDtypeStruct((batch, shape.hidden_size), DTYPE),
        Pool(pages, pages),
        *weights,
        cache.table(lengths),
        jax.ShapeDtypeStruct(lengths.shape, jnp.int32),
    )


def attention_seconds(program: Any, shape: ModelShape, lengths: np.ndarray, repeats: int) -> float:
    """Seconds for all layers with these lengths [L, B, C]."""
    cache = CacheShape.of(lengths, room=1)
    pages = cache.pages(shape.head_dim, DTYPE).shape
    pool = [Pool(drawn(3, pages, DTYPE), drawn(4, pages, DTYPE))]
    weights = [
        drawn(at, each, DTYPE, 0.02) for at, each in enumerate(_attention_weights(shape, lengths))
    ]
    table, counts = page_table(5, lengths, cache, room=1), jnp.asarray(lengths)
    x = jnp.ones((lengths.shape[1], shape.hidden_size), DTYPE)

    def again() -> Any:
        # The pool is donated, as in the engine: the next call takes the one that this returns.
        y, pool[0] = program(x, pool[0], *weights, table, counts)
        return y

    return seconds_of(again, (), repeats)


def lower_rest(shape: ModelShape, num_devices: int, batch: int) -> Lowered:
    """Lowers one device's share of all MLPs and of the logits."""

    def step(x: Any, gate: Any, up: Any, down: Any, lm_head: Any) -> Any:
        def layer(x: Any, weights: Any) -> tuple[Any, None]:
            gate, up, down = weights
            h = _normed(x)
            return x + (jax.nn.silu(h @ gate.T) * (h @ up.T)) @ down, None

        x, _ = jax.lax.scan(layer, x, (gate, up, down))
        return _normed(x) @ lm_head.T

    shapes = (batch, shape.hidden_size), *_rest_weights(shape, num_devices)
    return jax.jit(step).lower(*(jax.ShapeDtypeStruct(each, DTYPE) for each in shapes))


def rest_weights(shape: ModelShape, num_devices: int) -> list[jax.Array]:
    """The weights for `rest_seconds`, which are the same at every batch."""
    shapes = _rest_weights(shape, num_devices)
    return [drawn(at, each, DTYPE, 0.02) for at, each in enumerate(shapes)]


def rest_seconds(program: Any, weights: list[jax.Array], batch: int, repeats: int) -> float:
    x = jnp.ones((batch, weights[0].shape[-1]), DTYPE)
    return seconds_of(program, (x, *weights), repeats)


def _attention_weights(shape: ModelShape, lengths: np.ndarray) -> list[tuple[int, ...]]:
    """Shapes of the joined query, key and value projections, and of the output projection."""
    layers, _, slots = lengths.shape
    group = shape.num_heads // shape.num_kv_heads
    rows = slots * shape.head_dim
    return [
        (layers, rows * (group + 2), shape.hidden_size),
        (layers, rows * group, shape.hidden_size),
    ]


def _rest_weights(shape: ModelShape, num_devices: int) -> list[tuple[int, ...]]:
    part, hidden = -(-shape.intermediate_size // num_devices), shape.hidden_size
    mlp = (shape.num_layers, part, hidden)
    return [mlp, mlp, mlp, (-(-shape.vocab_size // num_devices), hidden)]


def _normed(x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-5)).astype(x.dtype)
