"""What decides the shapes of the compiled steps, and how a step is lowered over them.

Beside every jitted step stands a function that lowers it over `StepShapes`: the one place that
lists its arguments. The engine compiles from it, and so does the compile check for GPUs.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Lowered

from fairkv_jax.cache import LAYERS_BY_DEVICE, KVCache
from fairkv_jax.config import ModelConfig
from fairkv_jax.kv_cache_spec import KVCacheSpec
from fairkv_jax.sharding.slots import SlotLayout

_WHOLE = PartitionSpec()


@dataclass(frozen=True)
class StepShapes:
    """The sizes of a model's steps on a mesh."""

    mesh: Mesh
    config: ModelConfig
    layout: SlotLayout
    spec: KVCacheSpec
    model: Any
    """The parameters' shapes, see `abstract_model`."""

    def array(
        self, shape: tuple[int, ...], dtype: Any = jnp.int32, spec: PartitionSpec = _WHOLE
    ) -> Any:
        """An argument's shape, split over the mesh as `spec` says."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, spec))

    def placed(self, shapes: Any, specs: Any = _WHOLE) -> Any:
        """A pytree of arguments, split as `specs` says, which may be a prefix of the tree."""
        specs = jax.tree.broadcast(specs, shapes, is_leaf=lambda x: isinstance(x, PartitionSpec))
        return jax.tree.map(lambda x, spec: self.array(x.shape, x.dtype, spec), shapes, specs)

    @property
    def number(self) -> Any:
        """An integer argument."""
        return self.array(())

    @property
    def cache(self) -> KVCache:
        """The KV cache."""
        return self.placed(KVCache.shapes(self.spec), KVCache.partition())

    @property
    def by_slot(self) -> Any:
        """An array [L, P*C] of integers, split by device."""
        shape = self.layout.head_of_slot.shape
        return self.array(shape, spec=LAYERS_BY_DEVICE)

    @property
    def by_head(self) -> Any:
        """An array [L, K] of integers."""
        return self.array((self.config.num_layers, self.config.num_kv_heads))

    def lower(self, step: Any, *args: Any, **static: Any) -> Lowered:
        """Lowers a jitted step; kernels ask the abstract mesh what they are lowered for."""
        # GPUs would round the factors of float32 products to ten bits.
        precision = "highest" if self.model.dtype == jnp.float32 else None
        with (
            jax.default_matmul_precision(precision),
            jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh),
        ):
            return step.lower(*args, **static)
