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
from fairkv_jax.compress import make_policy
from fairkv_jax.config import KVConfig, ModelConfig
from fairkv_jax.decode import decode_step, idle_inputs
from fairkv_jax.models import decoder
from fairkv_jax.models.model import Model
from fairkv_jax.plan import ModelShape, Plan, Profile
from fairkv_jax.prefill import PrefillCarry, advance_prefill, start_prefill
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
    prefill_block: int = 1024
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


def lower_prefill(setup: Setup, mesh: Mesh, num_tokens: int, kv_config: KVConfig) -> Lowered:
    """The prefill of a prompt of `num_tokens`, compressed as `kv_config` says."""
    layers, slots = setup.layout.head_of_slot.shape
    heads = setup.config.num_kv_heads
    policy = make_policy(kv_config)
    block = min(setup.prefill_block, num_tokens)
    model = abstract_model(setup, mesh)
    number = _array(mesh, (), "int32", _WHOLE)
    state = jax.eval_shape(
        partial(
            start_prefill,
            mesh=mesh,
            block=block,
            window=policy.scorer.window,
            packed_size=kv_config.most_kept_of_a_layer(num_tokens, layers, heads),
        ),
        model,
        _array(mesh, (num_tokens,), "int32", _WHOLE),
    )
    state = jax.tree.map(
        lambda x, spec: _array(mesh, x.shape, x.dtype, spec), state, PrefillCarry.partition()
    )
    return _lower(
        advance_prefill,
        mesh,
        model,
        state,
        number,
        _array(mesh, (layers, heads), "int32", _WHOLE),
        number,
        (number, number),
        _array(mesh, (layers, slots), "int32", PartitionSpec(None, TENSOR_AXIS)),
        _array(mesh, (layers, heads), "int32", _WHOLE),
        policies=(policy,),
        block=block,
    )


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
