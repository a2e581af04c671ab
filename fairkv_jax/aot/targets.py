"""The GPUs to compile for. Their descriptions in XLA's format are text protos in `devices/`.

The values come from the vendors' publications and openxla/xla's target specifications.
"""

import os
import re
import shutil
from dataclasses import dataclass
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from fairkv_jax.shapes import DATA_AXIS, TENSOR_AXIS


@dataclass(frozen=True)
class Target:
    """One kind of GPU."""

    name: str
    description: str
    """XLA's GpuTargetConfigProto as text."""

    @property
    def memory_bytes(self) -> int:
        """Bytes of memory of one device."""
        return int(self._find(r"device_memory_size: (\d+)"))

    @property
    def architecture(self) -> str:
        """The architecture's name for ptxas, such as sm_80 or sm_90a."""
        major, minor = self._find(r"major: (\d+)"), self._find(r"minor: (\d+)")
        return f"sm_{major}{minor}" + "a" * ("ACCELERATED_FEATURES" in self.description)

    def _find(self, pattern: str) -> str:
        found = re.search(pattern, self.description)
        assert found, f"{self.name}.textproto lacks {pattern}"
        return found.group(1)

    def mesh(self, num_devices: int) -> Mesh:
        """Returns a mesh of GPUs of this kind, which can compile but not execute.

        Raises:
            RuntimeError: a part of the compiler is missing; the message says which.
        """
        missing = missing_parts()
        if missing:
            raise RuntimeError(missing)
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=self.description, topology=f"1x1x{num_devices}"
        )
        devices = np.array(topology.devices).reshape(1, num_devices)
        return Mesh(devices, (DATA_AXIS, TENSOR_AXIS), axis_types=(AxisType.Auto,) * 2)


def targets() -> dict[str, Target]:
    """Returns all targets by name."""
    folder = resources.files("fairkv_jax.aot") / "devices"
    files = sorted(folder.iterdir(), key=lambda path: path.name)
    names = [
        path.name.removesuffix(".textproto") for path in files if path.name.endswith(".textproto")
    ]
    return {name: Target(name, (folder / f"{name}.textproto").read_text()) for name in names}


def missing_parts() -> str | None:
    """Returns a message about the part of the compiler that is missing, or None.

    The message says how to install it.
    """
    if not any(find_spec(f"jax_{cuda}_plugin") for cuda in ("cuda13", "cuda12")):
        version = jax.__version__
        return (
            "JAX's CUDA plugin is not installed: run pip install --no-deps "
            f"jax-cuda13-plugin=={version} jax-cuda13-pjrt=={version}"
        )
    if find_ptxas() is None:
        return (
            "ptxas was not found: install the CUDA toolkit, or the wheels nvidia-cuda-nvcc and "
            "nvidia-nvvm"
        )
    return None


def find_ptxas() -> Path | None:
    """Returns the path of NVIDIA's assembler: in a wheel, on the PATH or in the CUDA toolkit.

    A wheel comes first, because it fits JAX's plugin: an older assembler rejects newer PTX.
    """
    wheels = sorted(Path(np.__file__).parents[1].glob("nvidia/*/bin/ptxas"), reverse=True)
    root = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    on_path = [Path(found) for found in (shutil.which("ptxas"),) if found]
    candidates = [*wheels, *on_path, root / "bin" / "ptxas"]
    return next((path for path in candidates if path.is_file()), None)
