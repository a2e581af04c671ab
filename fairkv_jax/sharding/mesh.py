"""The device mesh, and the table that maps logical axes to mesh axes."""

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, PartitionSpec

from fairkv_jax.shapes import DATA_AXIS, TENSOR_AXIS

RULES: dict[str | None, str | None] = {
    "slot": TENSOR_AXIS,
    "mlp": TENSOR_AXIS,
    "vocab": TENSOR_AXIS,
    "group": None,
    "gate_up": None,
    "head_dim": None,
    "model": None,
    None: None,
}


_IN_GRAPHS = (
    *("COLLECTIVES_KERNEL", "CONDITIONAL", "CUBLAS", "CUBLASLT", "CUDNN", "CUSTOM_CALL"),
    *("DYNAMIC_SLICE_FUSION", "FUSION", "WHILE"),
)
"""What XLA captures in CUDA graphs from jax 0.12 on: what it does by default, and loops.

Older versions cannot capture the sums over the devices, and with them the loop over layers.
"""
_GRAPH_OPTIONS: dict[str, Any] = {
    "xla_gpu_enable_command_buffer": ",".join(_IN_GRAPHS),
    "xla_gpu_command_buffer_unroll_loops": True,
}

GPU_COMPILER_OPTIONS: dict[str, Any] = {
    "xla_gpu_enable_triton_gemm": False,
    "xla_gpu_dot_merger_threshold_mb": 0,
    **(_GRAPH_OPTIONS if jax.__version_info__ >= (0, 12) else {}),
}
"""XLA's compiler options on GPUs, for float weights.

cuBLAS reads a layer's weights directly from the array that stacks all layers. XLA's own matrix
products first copy them out of it, which triples the bytes that a decode step reads and writes. So
would merged products, whose weights are copied side by side.

All layers of a decode step become one CUDA graph, whose loop is unrolled: the host launches one
graph instead of one a layer.
"""


def compiler_options(mesh: Mesh, *, int8: bool) -> dict[str, Any]:
    """Returns XLA's compiler options for the devices of a mesh.

    int8 weights use XLA's own matrix products, which convert the weights while they read them.
    cuBLAS would need converted copies, which cost more than copying the int8 weights.
    """
    is_gpu = mesh.devices.flat[0].platform == "gpu"
    return GPU_COMPILER_OPTIONS if is_gpu and not int8 else {}


def make_mesh(num_devices: int) -> Mesh:
    """Returns a mesh whose axis `tensor` has the first `num_devices` devices.

    Raises:
        ValueError: there are fewer devices.
    """
    devices = jax.devices()
    if num_devices > len(devices):
        raise ValueError(
            f"tensor_parallel_size {num_devices} needs {num_devices} devices, but "
            f"{len(devices)} {devices[0].platform} device(s) exist: lower it, or on the CPU set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={num_devices} before JAX starts"
        )
    axis_types = (AxisType.Auto, AxisType.Auto)
    names = (DATA_AXIS, TENSOR_AXIS)
    return jax.make_mesh((1, num_devices), names, axis_types, devices=devices[:num_devices])


def put_own_shards(arrays: Any, shardings: Any) -> Any:
    """Like `jax.device_put`, for a mesh of several processes that all hold the same arrays.

    `device_put` would compare the arrays of all processes, in a collective at every call.

    Args:
        arrays: a pytree of NumPy arrays.
        shardings: their shardings, as a prefix of that pytree.
    """
    shardings = jax.tree.broadcast(shardings, arrays)
    return jax.tree.map(
        lambda array, sharding: jax.make_array_from_callback(
            array.shape, sharding, array.__getitem__
        ),
        arrays,
        shardings,
    )


def spec(*axes: str | None) -> PartitionSpec:
    """Returns the partition spec of an array with these logical axes."""
    return PartitionSpec(*(RULES[axis] for axis in axes))
