"""The engine's decode step and prefill, lowered over shapes in place of arrays."""

from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Lowered

from fairkv_jax.cache import KVCache
from fairkv_jax.compress.budgets import max_kept_per_layer
from fairkv_jax.compress.registry import make_method
from fairkv_jax.config import KVConfig, ModelConfig
from fairkv_jax.decode import decode_step, idle_inputs
from fairkv_jax.models import decoder
from fairkv_jax.models.model import Model
from fairkv_jax.plan import ModelShape, Plan, Profile
from fairkv_jax.prefill import PrefillCarry, compress_layer, run_chunks, start_prefill
from fairkv_jax.shapes import TENSOR_AXIS
from fairkv_jax.sharding.load_weights import partition_specs
from fairkv_jax.sharding.slots import SlotLayout

_BY_SLOT = PartitionSpec(None, None, TENSOR_AXIS)
_WHOLE = PartitionSpec()


@dataclass(frozen=True)
class Setup:
    """Everything that decides what is compiled."""

    config: ModelConfig
    plan: Plan
    profile: Profile
    batch: int
    max_model_len: int = 8192
    new_tokens: int = 256
    """Tokens that every row has room to generate."""
    page_size: int = 16
    prefill_chunk_size: int = 1024
    dtype: str = "bfloat16"
    attention_backend: str = "auto"

    @cached_property
    def layout(self) -> SlotLayout:
        return SlotLayout.from_plan(self.plan)

    @property
    def pool_elements(self) -> int:
        """Of the keys, and as many of the values, on one device."""
        return self.pages_per_device * self.page_size * self.config.head_dim

    @cached_property
    def pages_per_device(self) -> int:
        """Of the fullest device, when every row holds what the profile expects and has grown."""
        pages = np.ceil((self.profile.array + self.new_tokens) / self.page_size)
        by_device = np.einsum("lk,lkp->p", pages, self.plan.shares())
        return int(np.ceil(self.batch * by_device.max()))


def config_of(shape: ModelShape, *, tie_word_embeddings: bool = False) -> ModelConfig:
    """A Llama of that shape; what its program computes with the constants does not matter here."""
    return ModelConfig(
        architecture="llama",
        **vars(shape),
        max_position_embeddings=131072,
        rope_theta=500000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tie_word_embeddings,
    )


def lower_decode_step(setup: Setup, mesh: Mesh) -> Lowered:
    """The decode step of the whole batch."""
    layers, slots = setup.layout.head_of_slot.shape
    new_pages = _array(mesh, (layers, setup.batch, slots), "int32", _BY_SLOT)
    rows = jax.eval_shape(lambda: idle_inputs(setup.batch, setup.config.vocab_size))
    rows = jax.tree.map(lambda x: _array(mesh, x.shape, x.dtype, _WHOLE), rows)
    steps = _array(mesh, (), "int32", _WHOLE)
    args = (abstract_model(setup, mesh), abstract_cache(setup, mesh), rows, new_pages, steps)
    return _lower(decode_step, mesh, *args, attention_backend=setup.attention_backend)


def lower_prefill(
    setup: Setup, mesh: Mesh, num_tokens: int, kv_config: KVConfig
) -> dict[str, Lowered]:
    """Lowers the programs of a prompt of `num_tokens`: its chunks, and a layer's compression."""
    layers, slots = setup.layout.head_of_slot.shape
    heads = setup.config.num_kv_heads
    methods = (make_method(kv_config),)
    chunk_size = min(setup.prefill_chunk_size, num_tokens)
    model = abstract_model(setup, mesh)
    number = _array(mesh, (), "int32", _WHOLE)
    carry = jax.eval_shape(
        partial(
            start_prefill,
            mesh=mesh,
            chunk_size=chunk_size,
            methods=methods,
            packed_size=max_kept_per_layer(kv_config, num_tokens, layers, heads),
        ),
        model,
        _array(mesh, (num_tokens,), "int32", _WHOLE),
    )
    specs = jax.tree.broadcast(PrefillCarry.partition(), carry)
    carry = jax.tree.map(lambda x, spec: _array(mesh, x.shape, x.dtype, spec), carry, specs)
    by_head = _array(mesh, (layers, heads), "int32", _WHOLE)
    by_slot = _array(mesh, (layers, slots), "int32", PartitionSpec(None, TENSOR_AXIS))
    is_whole = _array(mesh, (), "bool", _WHOLE)
    args = (model, carry, number, number, is_whole, (number, number), by_slot, by_head)
    chunks = _lower(run_chunks, mesh, *args, methods=methods, chunk_size=chunk_size)
    args = (carry, number, number, by_head, number, by_slot, by_head)
    return {
        "prefill": chunks,
        "compression": _lower(compress_layer, mesh, *args, methods=methods),
    }


def abstract_model(setup: Setup, mesh: Mesh) -> Model:
    """The parameters' shapes, placed as `load_model` places them."""
    layout = setup.layout
    shapes = decoder.abstract_model(setup.config, layout.num_slots, layout.num_devices, setup.dtype)
    return jax.tree.map(
        lambda x, spec: _array(mesh, x.shape, x.dtype, spec), shapes, partition_specs(shapes)
    )


def abstract_cache(setup: Setup, mesh: Mesh) -> KVCache:
    """The pool's shapes: as many pages a device as the fullest one needs."""
    layers, slots = setup.layout.head_of_slot.shape
    num_pages = setup.layout.num_devices * setup.pages_per_device
    pool = (num_pages, setup.page_size, setup.config.head_dim)
    max_pages = -(-setup.max_model_len // setup.page_size)
    shapes = jax.eval_shape(
        lambda: KVCache(
            jnp.zeros(pool, setup.dtype),
            jnp.zeros(pool, setup.dtype),
            jnp.zeros((layers, setup.batch, slots, max_pages), jnp.int32),
            jnp.zeros((layers, setup.batch, slots), jnp.int32),
            jnp.zeros((setup.batch, setup.max_model_len), jnp.int32),
            jnp.zeros(setup.batch, jnp.int32),
        )
    )
    return jax.tree.map(
        lambda x, spec: _array(mesh, x.shape, x.dtype, spec), shapes, KVCache.partition()
    )


def device_bytes(shapes: Any) -> int:
    """Bytes on one device of a pytree of placed shapes."""
    return sum(
        prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(shapes)
    )


def _array(mesh: Mesh, shape: tuple[int, ...], dtype: Any, spec: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def _lower(step: Any, mesh: Mesh, *args: Any, **static: Any) -> Lowered:
    """The lowered step; kernels ask the abstract mesh what they are lowered for."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return step.lower(*args, mesh=mesh, **static)
