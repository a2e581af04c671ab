"""What a compiled step takes of a device: memory, registers, spills, collectives, copies."""

import os
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

from jax.stages import Lowered

from fairkv_jax.aot.targets import find_ptxas
from fairkv_jax.sharding.mesh import GPU_COMPILER_OPTIONS

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
OURS = ("append_and_decode", "ragged_decode", "list_pieces", "merge_pieces")
_MOSAIC_FOLDER = "MOSAIC_GPU_DUMP_TO"
_SHAPE = re.compile(r"\b(?:pred|[a-z]+\d+)\[([\d,]*)\]")


@dataclass(frozen=True)
class Kernel:
    """One kernel's figures, as the assembler prints them."""

    name: str
    registers: int
    spill_bytes: int
    """Stored and loaded, per thread."""


@dataclass(frozen=True)
class Report:
    """A compiled step on one device."""

    compile_seconds: float
    argument_bytes: int
    temporary_bytes: int
    new_output_bytes: int
    """Of outputs that are no argument updated in place."""
    kernels: tuple[Kernel, ...]
    collectives: dict[str, int]
    """Calls by kind; those in a loop count as often as it turns, once where that is not fixed."""
    hlo: str

    @property
    def own_kernels(self) -> tuple[Kernel, ...]:
        """The project's kernels, without XLA's."""
        return tuple(kernel for kernel in self.kernels if kernel.name.startswith(OURS))

    @property
    def spilling(self) -> tuple[Kernel, ...]:
        return tuple(kernel for kernel in self.kernels if kernel.spill_bytes)

    def copies_of(self, num_elements: int) -> list[str]:
        """The HLO's copies of at least that many elements, parts of a larger array included.

        None may be as large as the pool, nor, while it decodes, as a layer's weights.
        """
        return [
            line.strip()
            for line in self.hlo.splitlines()
            if re.search(r"\bcopy(-start)?\(|kind=kLoop, calls=%\S*dynamic_slice", line)
            and max(map(_elements, _SHAPE.findall(line)), default=0) >= num_elements
        ]


def compile_and_report(lowered: Lowered, architecture: str) -> Report:
    """Compiles, and reads the machine code that the compiler leaves in a folder."""
    with tempfile.TemporaryDirectory() as folder, _mosaic_writes_to(folder):
        options = {"xla_dump_to": folder, "xla_dump_emitter_re": "ptx", **GPU_COMPILER_OPTIONS}
        start = time.perf_counter()
        compiled = lowered.compile(compiler_options=options)
        seconds = time.perf_counter() - start
        kernels = read_kernels(Path(folder), architecture)
    memory = compiled.memory_analysis()
    hlo = compiled.as_text() or ""
    assert memory is not None
    return Report(
        compile_seconds=seconds,
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        new_output_bytes=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        kernels=kernels,
        collectives=count_collectives(hlo),
        hlo=hlo,
    )


@contextmanager
def _mosaic_writes_to(folder: str) -> Iterator[None]:
    """Kernels of Mosaic GPU are compiled beside XLA's own, and left in a folder of the environment.

    It disassembles them too, and says on stderr where it finds no nvdisasm: nothing depends on it.
    """
    before = os.environ.get(_MOSAIC_FOLDER)
    os.environ[_MOSAIC_FOLDER] = folder
    try:
        yield
    finally:
        del os.environ[_MOSAIC_FOLDER]
        if before is not None:
            os.environ[_MOSAIC_FOLDER] = before


def read_kernels(folder: Path, architecture: str) -> tuple[Kernel, ...]:
    """Assembles every PTX file of a folder and reads what the assembler says of its kernels."""
    ptxas, kernels = find_ptxas(), []
    assert ptxas is not None
    for path in sorted(folder.glob("*.ptx")):
        command = [str(ptxas), "-v", f"-arch={architecture}", "-o", "/dev/null", str(path)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        kernels += parse_assembler(said)
    return tuple(kernels)


def parse_assembler(said: str) -> list[Kernel]:
    """Reads `ptxas -v`: an entry's name, then its spills, then its registers."""
    pattern = (
        r"entry function '(\S+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers"
    )
    return [
        Kernel(name, int(registers), int(stores) + int(loads))
        for name, stores, loads, registers in re.findall(pattern, said, re.DOTALL)
    ]


def count_collectives(hlo: str) -> dict[str, int]:
    """Collectives of an optimised module's text.

    Loops of a fixed length, as that over the layers, say it. One decode step is one turn of the
    loop over steps, whose length is an argument.
    """
    inside, turns = {}, {}
    found: list[tuple[str, str]] = []
    computation = ""
    for line in hlo.splitlines():
        header = re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line)
        if header and not line.startswith(" "):
            computation = header.group(1)
        loop = re.search(r" while\(.*body=%?([\w.\-]+)", line)
        if loop:
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
            inside[loop.group(1)] = computation
            turns[loop.group(1)] = int(trips.group(1)) if trips else 1
        found += [
            (kind, computation) for kind in COLLECTIVES if re.search(rf" {kind}(-start)?\(", line)
        ]
    counts: Counter[str] = Counter()
    for kind, computation in found:
        calls = 1
        while computation in inside:
            calls *= turns[computation]
            computation = inside[computation]
        counts[kind] += calls
    return dict(counts)


def _elements(dims: str) -> int:
    return prod(int(dim) for dim in dims.split(",") if dim)
