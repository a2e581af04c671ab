"""The device mesh, and the one table that maps logical axes to mesh axes."""

import jax
from jax.sharding import AxisType, Mesh, PartitionSpec

from fairkv_jax.shapes import DATA_AXIS, TENSOR_AXIS

RULES: dict[str | None, str | None] = {
    "slot": TENSOR_AXIS,
    "mlp": TENSOR_AXIS,
    "vocab": TENSOR_AXIS,
    "group": None,
    "head_dim": None,
    "model": None,
    None: None,
}


GPU_COMPILER_OPTIONS: dict[str, str | bool] = {"xla_gpu_enable_triton_gemm": False}
"""Compiler options on GPUs, for float weights.

cuBLAS reads a layer's weights directly from the stack of all layers. XLA's own matrix products copy
them out of the stack first, which triples the bytes that a decode step reads and writes.
"""


def compiler_options(mesh: Mesh, *, int8: bool) -> dict[str, str | bool]:
    """XLA's compiler options for the devices of a mesh, where they differ from the defaults.

    int8 weights use XLA's own matrix products, which convert them while they are read. Copying
    their bytes is cheaper than writing and reading them converted, which cuBLAS would require.
    """
    is_gpu = mesh.devices.flat[0].platform == "gpu"
    return GPU_COMPILER_OPTIONS if is_gpu and not int8 else {}


def make_mesh(num_devices: int) -> Mesh:
    """A mesh of the first `num_devices` devices along `tensor`.

    Raises:
        ValueError: the machine has fewer devices.
    """
    devices = jax.devices()
    if num_devices > len(devices):
        raise ValueError(
            f"tensor_parallel_size {num_devices} needs {num_devices} devices, but "
            f"{len(devices)} {devices[0].platform} device(s) exist: lower it, or on CPU set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={num_devices} before JAX starts"
        )
    axis_types = (AxisType.Auto, AxisType.Auto)
    names = (DATA_AXIS, TENSOR_AXIS)
    return jax.make_mesh((1, num_devices), names, axis_types, devices=devices[:num_devices])


def spec(*axes: str | None) -> PartitionSpec:
    """The partition of an array with these logical axes."""
    return PartitionSpec(*(RULES[axis] for axis in axes))
