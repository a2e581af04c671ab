"""One device's share of a decode step: its attention layers, and what is split evenly."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Lowered

from benchmarks.gpu_suite.inputs import CacheShape, drawn, page_table
from benchmarks.gpu_suite.programs import compile_all
from fairkv_jax.pallas.ragged_decode import AUTO, Device, Pool, append_and_decode
from fairkv_jax.plan import ModelShape

Call = Callable[[], Any]


class Steps:
    """The shares of a model's decode steps, as functions that can be timed.

    Programs are kept for later calls of `prepare`. All functions take their arrays from here: one
    pool, one set of weights for each number of slots in use, and one for what is split evenly.
    """

    def __init__(self, shape: ModelShape, device: Device, dtype: str, least_pages: int) -> None:
        self._shape, self._device, self._dtype = shape, device, dtype
        self._least_pages = least_pages
        self._programs: dict[Any, Any] = {}
        self._arrays: dict[Any, tuple[Any, Any]] = {}
        self._cache = CacheShape(0, 0)

    def num_bytes(self, lengths: Iterable[np.ndarray], num_devices: int) -> int:
        """Bytes of all arrays that `prepare` and the calls need on the device."""
        lengths = list(lengths)
        cache = CacheShape.of(*lengths, room=1, least_pages=self._least_pages)
        weights = {each.shape[2]: attention_weights(self._shape, each.shape[2]) for each in lengths}
        shapes = [shape for each in weights.values() for shape in each]
        shapes += rest_weights(self._shape, num_devices)
        shapes += 2 * [cache.pages(self._shape.head_dim, self._dtype).shape]
        return sum(int(np.prod(shape)) for shape in shapes) * jnp.dtype(self._dtype).itemsize

    def prepare(self, lengths: Iterable[np.ndarray], rests: Iterable[tuple[int, int]]) -> None:
        """Compiles the attention of several lengths [L, B, C], which share one pool, and the rest.

        Args:
            rests: pairs of a number of devices and a batch.
        """
        lengths = list(lengths)
        if lengths:
            self._cache = CacheShape.of(*lengths, room=1, least_pages=self._least_pages)
            needed = {"pool", "rest", *(each.shape[2] for each in lengths)}
            self._arrays = {role: each for role, each in self._arrays.items() if role in needed}
        wanted: dict[Any, Callable[[], Lowered]] = {
            self._key(each): partial(self._lower_attention, each) for each in lengths
        }
        wanted |= {rest: partial(self._lower_rest, *rest) for rest in rests}
        missing = {key: lower for key, lower in wanted.items() if key not in self._programs}
        for key, program in compile_all(missing).items():
            if isinstance(program, Exception):
                raise program
            self._programs[key] = program

    def attention(self, lengths: np.ndarray) -> Call:
        """The attention of all layers with these lengths [L, B, C], which `prepare` was given."""
        program, cache = self._programs[self._key(lengths)], self._cache
        _, batch, slots = lengths.shape
        pages = cache.pages(self._shape.head_dim, self._dtype).shape
        pool = self._kept(
            "pool", pages, lambda: [Pool(self._drawn(3, pages), self._drawn(4, pages))]
        )
        weights = self._kept(
            slots, slots, lambda: self._weights(attention_weights(self._shape, slots))
        )
        table, counts = page_table(5, lengths, cache, room=1), jnp.asarray(lengths)
        x = jnp.ones((batch, self._shape.hidden_size), self._dtype)

        def call() -> Any:
            # The pool is donated, as in the engine: the next call takes the one that this returns.
            y, pool[0] = program(x, pool[0], *weights, table, counts)
            return y

        return call

    def rest(self, num_devices: int, batch: int) -> Call:
        """One device's share of all MLPs and of the logits."""
        program = self._programs[num_devices, batch]
        weights = self._kept(
            "rest", num_devices, lambda: self._weights(rest_weights(self._shape, num_devices))
        )
        x = jnp.ones((batch, self._shape.hidden_size), self._dtype)
        return lambda: program(x, *weights)

    def _key(self, lengths: np.ndarray) -> tuple[Any, ...]:
        return "attention", lengths.shape, self._cache.num_pages

    def _kept(self, role: Any, key: Any, make: Callable[[], Any]) -> Any:
        """The arrays of a role; those with another key are freed before new ones are made."""
        if role not in self._arrays or self._arrays[role][0] != key:
            self._arrays.pop(role, None)
            self._arrays[role] = key, make()
        return self._arrays[role][1]

    def _drawn(self, seed: int, shape: tuple[int, ...], scale: float = 1.0) -> jax.Array:
        return drawn(seed, shape, self._dtype, scale)

    def _weights(self, shapes: list[tuple[int, ...]]) -> list[jax.Array]:
        return [self._drawn(at, each, 0.02) for at, each in enumerate(shapes)]

    def _lower_attention(self, lengths: np.ndarray) -> Lowered:
        """Lowers norm, projections, attention with append, and output projection of all layers."""
        shape, device = self._shape, self._device
        num_layers, batch, slots = lengths.shape
        group, width = shape.num_heads // shape.num_kv_heads, shape.head_dim
        pages: Any = self._cache.pages(width, self._dtype)

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

        return jax.jit(step, donate_argnums=1).lower(
            self._abstract((batch, shape.hidden_size)),
            Pool(pages, pages),
            *(self._abstract(each) for each in attention_weights(shape, slots)),
            self._cache.table(lengths),
            jax.ShapeDtypeStruct(lengths.shape, jnp.int32),
        )

    def _lower_rest(self, num_devices: int, batch: int) -> Lowered:
        def step(x: Any, gate: Any, up: Any, down: Any, lm_head: Any) -> Any:
            def layer(x: Any, weights: Any) -> tuple[Any, None]:
                gate, up, down = weights
                h = _normed(x)
                return x + (jax.nn.silu(h @ gate.T) * (h @ up.T)) @ down, None

            x, _ = jax.lax.scan(layer, x, (gate, up, down))
            return _normed(x) @ lm_head.T

        shapes = (batch, self._shape.hidden_size), *rest_weights(self._shape, num_devices)
        return jax.jit(step).lower(*map(self._abstract, shapes))

    def _abstract(self, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, self._dtype)


def attention_weights(shape: ModelShape, slots: int) -> list[tuple[int, ...]]:
    """Shapes of the joined query, key and value projections, and of the output projection."""
    group = shape.num_heads // shape.num_kv_heads
    rows = slots * shape.head_dim
    return [
        (shape.num_layers, rows * (group + 2), shape.hidden_size),
        (shape.num_layers, rows * group, shape.hidden_size),
    ]


def rest_weights(shape: ModelShape, num_devices: int) -> list[tuple[int, ...]]:
    """Shapes of one device's part of the MLPs and of the logits."""
    part, hidden = -(-shape.intermediate_size // num_devices), shape.hidden_size
    mlp = (shape.num_layers, part, hidden)
    return [mlp, mlp, mlp, (-(-shape.vocab_size // num_devices), hidden)]


def _normed(x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-5)).astype(x.dtype)
