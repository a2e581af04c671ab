"""Lowers the engine's decode step and prefill for a GPU target, with abstract arguments.

The arguments are declared beside the steps; this module determines their sizes.
"""

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.stages import Lowered

from fairkv_jax import decode
from fairkv_jax.compress.budgets import MaxKept
from fairkv_jax.compress.registry import make_method
from fairkv_jax.compress_layer import lower_compress_layer
from fairkv_jax.config import KVConfig, ModelConfig, page_dtype
from fairkv_jax.kv_cache_spec import KVCacheSpec
from fairkv_jax.models.decoder import abstract_model
from fairkv_jax.plan import ModelShape, Plan, Profile
from fairkv_jax.prefill import lower_run_chunks
from fairkv_jax.prefill_carry import PrefillShapes
from fairkv_jax.sharding.load_weights import partition_specs
from fairkv_jax.sharding.slots import SlotLayout
from fairkv_jax.sharding.step_shapes import StepShapes


@dataclass(frozen=True)
class Setup:
    """The model, the plan and the sizes of the steps to compile."""

    config: ModelConfig
    plan: Plan
    profile: Profile
    batch: int
    max_model_len: int = 8192
    new_tokens: int = 256
    """Generated tokens per row for which the KV cache has room."""
    page_size: int = 16
    prefill_chunk_size: int = 1024
    dtype: str = "bfloat16"
    kv_cache_dtype: str = "auto"
    attention_backend: str = "auto"

    @cached_property
    def layout(self) -> SlotLayout:
        return SlotLayout.from_plan(self.plan)

    @cached_property
    def cache(self) -> KVCacheSpec:
        """A KV cache whose pages suffice for the fullest device.

        Every row holds the tokens that the profile expects and `new_tokens` generated ones.
        """
        pages = np.ceil((self.profile.array + self.new_tokens) / self.page_size)
        by_device = np.einsum("lk,lkp->p", pages, self.plan.shares())
        return KVCacheSpec(
            num_layers=self.config.num_layers,
            num_rows=self.batch,
            num_devices=self.plan.num_devices,
            slots_per_device=self.layout.slots_per_device,
            head_dim=self.config.head_dim,
            page_size=self.page_size,
            pages_per_device=int(np.ceil(self.batch * by_device.max())),
            max_tokens=self.max_model_len,
            dtype=page_dtype(self.kv_cache_dtype, self.dtype),
        )

    @property
    def pool_elements(self) -> int:
        """Number of elements of the keys on one device, equal to that of the values."""
        return self.cache.pages_per_device * self.page_size * self.config.head_dim

    @property
    def logits_move_bytes(self) -> int:
        """Bytes that one move of the batch's float32 logits reads and writes."""
        return 2 * 4 * self.batch * self.config.vocab_size

    def shapes(self, mesh: Mesh) -> StepShapes:
        """Returns the abstract arguments of the steps on a mesh."""
        layout = self.layout
        model = abstract_model(self.config, layout.num_slots, layout.num_devices, self.dtype)
        shapes = StepShapes(mesh, self.config, layout, self.cache, model)
        placed = shapes.placed(model, partition_specs(model))
        return StepShapes(mesh, self.config, layout, self.cache, placed)


def config_of(shape: ModelShape, *, tie_word_embeddings: bool = False) -> ModelConfig:
    """Returns the configuration of a Llama with that shape.

    The values of the other fields do not affect the resources of its programs.
    """
    return ModelConfig(
        architecture="llama",
        **vars(shape),
        max_position_embeddings=131072,
        rope_theta=500000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tie_word_embeddings,
    )


def lower_decode_step(setup: Setup, mesh: Mesh) -> Lowered:
    """Lowers the decode step of the whole batch."""
    return decode.lower_decode_step(setup.shapes(mesh), setup.batch, setup.attention_backend)


def lower_prefill(
    setup: Setup, mesh: Mesh, num_tokens: int, kv_config: KVConfig
) -> dict[str, Lowered]:
    """Lowers the programs of a prefill of `num_tokens`: the chunks, and compression per layer."""
    config = setup.config
    shapes = PrefillShapes(
        setup.shapes(mesh),
        num_tokens,
        min(setup.prefill_chunk_size, num_tokens),
        (make_method(kv_config),),
        MaxKept.of(kv_config, num_tokens, config.num_layers, config.num_kv_heads),
    )
    return {
        "prefill": lower_run_chunks(shapes),
        "compression": lower_compress_layer(shapes),
    }


def device_bytes(shapes: Any) -> int:
    """Returns the bytes on one device of a pytree of abstract arrays with shardings."""
    return sum(
        prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(shapes)
    )
