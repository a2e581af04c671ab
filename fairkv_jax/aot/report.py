"""Reports a compiled step's resources: memory, registers, spills, collectives and moved bytes."""

import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

from jax.stages import Lowered

from fairkv_jax.aot.hlo import Module, Move
from fairkv_jax.aot.launches import Launches, read_launches
from fairkv_jax.aot.targets import find_ptxas
from fairkv_jax.sharding.mesh import GPU_COMPILER_OPTIONS

OURS = ("append_and_decode", "ragged_decode", "list_pieces", "merge_pieces")
MAX_MOVED_SHARE = 0.01
"""The bytes that a decode step may move without computing with them, as a share of the weights'."""
_MOSAIC_FOLDER = "MOSAIC_GPU_DUMP_TO"
_SHAPE = re.compile(r"\b(?:pred|[a-z]+\d+)\[([\d,]*)\]")


@dataclass(frozen=True)
class Kernel:
    """The figures of one kernel, which the assembler prints."""

    name: str
    registers: int
    spill_bytes: int
    """Bytes of spill stores and loads per thread."""


@dataclass(frozen=True)
class Report:
    """The resources of a compiled step on one device."""

    compile_seconds: float
    argument_bytes: int
    temporary_bytes: int
    new_output_bytes: int
    """Bytes of outputs that do not alias a donated argument."""
    kernels: tuple[Kernel, ...]
    collectives: dict[str, int]
    """Calls by kind, see `Module`."""
    moves: tuple[Move, ...]
    """What moves values without computing with them, see `Module`; the most bytes first."""
    launches: Launches | None
    """What one call launches; None if this XLA does not tell."""
    hlo: str

    @property
    def own_kernels(self) -> tuple[Kernel, ...]:
        """The kernels of this project, without those that XLA generates."""
        return tuple(kernel for kernel in self.kernels if kernel.name.startswith(OURS))

    @property
    def spilling(self) -> tuple[Kernel, ...]:
        return tuple(kernel for kernel in self.kernels if kernel.spill_bytes)

    def moved_bytes(self, sampling_bytes: int = 0) -> int:
        """Returns the bytes that the moves read and write, in all their calls.

        Outside the loop over layers, moves of at most `sampling_bytes` do not count: those of the
        logits grow with the batch and the vocabulary, and not with the model's weights.
        """
        return sum(
            move.total_bytes
            for move in self.moves
            if move.calls > 1 or move.num_bytes > sampling_bytes
        )

    def copies_of(self, num_elements: int) -> list[str]:
        """Returns the lines of the HLO that copy at least `num_elements` elements.

        Slices of larger arrays count too. A decode step must copy neither the KV pool nor a layer's
        weights.
        """
        return [
            line.strip()
            for line in self.hlo.splitlines()
            if re.search(r"\bcopy(-start)?\(|kind=kLoop, calls=%\S*dynamic_slice", line)
            and max(map(_elements, _SHAPE.findall(line)), default=0) >= num_elements
        ]


def compile_and_report(lowered: Lowered, architecture: str) -> Report:
    """Compiles a step, and reads the kernels' figures from the code that the compiler dumps."""
    with tempfile.TemporaryDirectory() as folder, _mosaic_writes_to(folder):
        options = {"xla_dump_to": folder, "xla_dump_emitter_re": "ptx", **GPU_COMPILER_OPTIONS}
        start = time.perf_counter()
        compiled = lowered.compile(compiler_options=options)
        seconds = time.perf_counter() - start
        kernels = read_kernels(Path(folder), architecture)
        hlo = compiled.as_text() or ""
        module = Module(hlo)
        launches = read_launches(Path(folder), module)
    memory = compiled.memory_analysis()
    assert memory is not None
    return Report(
        compile_seconds=seconds,
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        new_output_bytes=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        kernels=kernels,
        collectives=module.collectives(),
        moves=tuple(module.moves()),
        launches=launches,
        hlo=hlo,
    )


@contextmanager
def _mosaic_writes_to(folder: str) -> Iterator[None]:
    """Sets the environment variable that makes Mosaic GPU dump its kernels into a folder.

    Mosaic also disassembles them and prints a message to stderr if nvdisasm is missing, which has
    no effect here.
    """
    before = os.environ.get(_MOSAIC_FOLDER)
    os.environ[_MOSAIC_FOLDER] = folder
    try:
        yield
    finally:
        del os.environ[_MOSAIC_FOLDER]
        if before is not None:
            os.environ[_MOSAIC_FOLDER] = before


class AssemblerError(RuntimeError):
    """The assembler rejects the compiler's PTX; the message is one sentence."""


def read_kernels(folder: Path, architecture: str) -> tuple[Kernel, ...]:
    """Assembles every PTX file of a folder and parses the assembler's figures of its kernels.

    Raises:
        AssemblerError: the assembler fails.
    """
    ptxas, kernels = find_ptxas(), []
    assert ptxas is not None
    for path in sorted(folder.glob("*.ptx")):
        command = [str(ptxas), "-v", f"-arch={architecture}", "-o", "/dev/null", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = next(iter(done.stderr.strip().splitlines()), f"status {done.returncode}")
            raise AssemblerError(
                f"{ptxas} cannot assemble {path.name} for {architecture} ({reason}): install the "
                "newest wheels nvidia-cuda-nvcc and nvidia-nvvm, which are taken first"
            )
        kernels += parse_assembler(done.stderr)
    return tuple(kernels)


def parse_assembler(said: str) -> list[Kernel]:
    """Parses the output of `ptxas -v`: an entry's name, then its spills, then its registers."""
    pattern = (
        r"entry function '(\S+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers"
    )
    return [
        Kernel(name, int(registers), int(stores) + int(loads))
        for name, stores, loads, registers in re.findall(pattern, said, re.DOTALL)
    ]


def _elements(dims: str) -> int:
    return prod(int(dim) for dim in dims.split(",") if dim)
