"""Counts what one call of a compiled step launches: CUDA graphs, and kernels in them or alone.

XLA dumps its sequence of thunks as an indented list. A thunk is a kernel, a copy, a call of a
library, or a group of others: a command buffer becomes one CUDA graph.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fairkv_jax.aot.hlo import Module

_NO_LAUNCH = {"kAsyncDone", "kPartitionId", "kReplicaId", "kWaitForStreams"}
_GRAPH, _LOOP, _CONDITIONAL, _BRANCH = "kCommandBuffer", "kWhile", "kConditional", "branch"


@dataclass(frozen=True)
class Launches:
    """What the host launches in one call, and what runs within the graphs."""

    graphs: int = 0
    in_graphs: int = 0
    """Kernels, copies and library calls in the graphs."""
    alone: int = 0
    """Those outside of graphs."""

    def __add__(self, other: "Launches") -> "Launches":
        in_graphs = self.in_graphs + other.in_graphs
        return Launches(self.graphs + other.graphs, in_graphs, self.alone + other.alone)

    def times(self, calls: int) -> "Launches":
        return Launches(self.graphs * calls, self.in_graphs * calls, self.alone * calls)


@dataclass
class _Thunk:
    id: int
    kind: str
    indent: int
    inside: list["_Thunk"] = field(default_factory=list)


def read_launches(folder: Path, module: Module) -> Launches | None:
    """Counts the launches of the module whose dump lies in a folder; None if there is no dump.

    Loops count as in `Module`. Of a conditional's branches the one with the fewest launches counts.
    """
    sequence = next(iter(folder.glob("*.thunk_sequence_after_thunk_passes.txt")), None)
    metadata = next(iter(folder.glob("*.thunk_metadata.txt")), None)
    if sequence is None or metadata is None:
        return None
    return count_launches(sequence.read_text(), metadata.read_text(), module)


def count_launches(sequence: str, metadata: str, module: Module) -> Launches:
    """As `read_launches`, of the two files' text."""
    loops = re.findall(
        r'profile_annotation: "([^"]*)"\s+thunk_id: (\d+)\s+\}\s+thunk_kind: "kWhile"', metadata
    )
    trips = {int(thunk): module.trip_count(name) for name, thunk in loops}
    return _count(_parse(sequence), trips, in_graph=False)


def _parse(sequence: str) -> list[_Thunk]:
    """The thunks of the sequence, each with those that are indented below it."""
    top = _Thunk(-1, "", -1)
    open_thunks = [top]
    for thunk in _lines(sequence):
        while open_thunks[-1].indent >= thunk.indent:
            open_thunks.pop()
        open_thunks[-1].inside.append(thunk)
        open_thunks.append(thunk)
    return top.inside


def _lines(sequence: str) -> Iterator[_Thunk]:
    for line in sequence.splitlines():
        found = re.match(r"( *)(?:(\d+): (k\w+)|\w*branch\w*.*:$)", line)
        if found:
            number, kind = int(found.group(2) or -1), found.group(3) or _BRANCH
            yield _Thunk(number, kind, len(found.group(1)))


def _count(thunks: list[_Thunk], trips: dict[int, int], *, in_graph: bool) -> Launches:
    total = Launches()
    for thunk in thunks:
        if thunk.kind == _GRAPH:
            total += Launches(graphs=1) + _count(thunk.inside, trips, in_graph=True)
        elif thunk.kind == _LOOP:
            inside = _count(thunk.inside, trips, in_graph=in_graph)
            total += inside.times(trips.get(thunk.id, 1))
        elif thunk.kind == _CONDITIONAL:
            branches = [_count(each.inside, trips, in_graph=in_graph) for each in thunk.inside]
            total += min(branches, key=_all, default=Launches())
        elif thunk.inside:
            total += _count(thunk.inside, trips, in_graph=in_graph)
        elif thunk.kind not in _NO_LAUNCH:
            total += Launches(in_graphs=int(in_graph), alone=int(not in_graph))
    return total


def _all(launches: Launches) -> int:
    return launches.graphs + launches.in_graphs + launches.alone
