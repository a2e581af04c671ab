"""What a model takes of each device of a mesh, by part of the model."""

import math

from fairkv_jax.checkpoint.layout import split_name, tensor_shapes
from fairkv_jax.config import ModelConfig
from fairkv_jax.plan import Plan

_SCALE_BYTES = 4


def device_bytes(
    config: ModelConfig, plan: Plan, itemsize: int, *, int8: bool = False
) -> dict[str, int]:
    """Bytes on every device: all are alike, because JAX shards evenly and pads what is not.

    `itemsize` is that of the weights and, with `int8`, of what stays beside the matrices.
    """
    size: dict[str, int] = {"heads": 0, "mlp": 0, "vocabulary": 0, "norms": 0}
    for name, shape in tensor_shapes(config).items():
        kind, _ = split_name(name)
        if kind in ("embed", "unembed"):
            part, rows = "vocabulary", -(-shape[0] // plan.num_devices)
        elif kind in ("gate", "up", "down"):
            part, rows = "mlp", -(-shape[0] // plan.num_devices)
        elif kind.endswith("norm"):
            part, rows = "norms", shape[0]
        else:
            part, rows = "heads", plan.slots
        count = rows * math.prod(shape[1:])
        if not int8 or part == "norms" or kind.endswith("bias"):
            size[part] += count * itemsize
            continue
        channels = shape[-1] if kind in ("o", "down") else count // shape[-1]
        size[part] += count + channels * _SCALE_BYTES
    return size
