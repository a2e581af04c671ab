"""Reads the text of an optimised HLO module: the collectives it calls, and the bytes it moves.

Everything is counted per call of the module. Loops with a known trip count, such as the loop over
layers, count as often as they turn. Loops without one count as one turn: so the loop over decode
steps counts one step, and a prefill's loops one layer and one chunk.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_MOVING = {
    *("copy", "copy-start", "concatenate", "transpose", "slice", "dynamic-slice"),
    *("dynamic-update-slice", "reshape", "reverse", "pad"),
}
"""Operations that put values elsewhere and compute nothing."""
_TRANSPARENT = {"bitcast", "tuple", "get-tuple-element"}
"""Operations that move nothing themselves."""
_FUSIONS = ("fusion", "fusion-start")
_SHAPE = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%([\w.\-]+)"
    r"|(?:branch_computations|called_computations)=\{([^}]*)\}"
)


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    called: tuple[str, ...]
    """The computations that it calls, in the order of the text."""
    line: str

    @property
    def num_bytes(self) -> int:
        """Bytes of the result, without layout padding; of a tuple, the sum."""
        return sum(_bits(*found) for found in _SHAPE.findall(self.shape)) // 8

    @property
    def is_scalar(self) -> bool:
        return all(dims in ("", "1") for _, _, dims in _SHAPE.findall(self.shape))

    @property
    def num_calls(self) -> int:
        """How often a call of this instruction runs its computations."""
        trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', self.line)
        return int(trips.group(1)) if trips and self.opcode == "while" else 1


@dataclass(frozen=True)
class Move:
    """An instruction that moves values without computing with them."""

    line: str
    num_bytes: int
    """Read and written in one call."""
    calls: int

    @property
    def total_bytes(self) -> int:
        return self.num_bytes * self.calls


class Module:
    """The computations of a module, by name."""

    def __init__(self, hlo: str):
        self._computations: dict[str, dict[str, Instruction]] = {}
        self._roots: dict[str, str] = {}
        self._entry = ""
        name = ""
        for line in hlo.splitlines():
            header = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
            if header and not line.startswith(" "):
                name = header.group(2)
                self._computations[name] = {}
                self._entry = name if header.group(1) else self._entry
                continue
            instruction = parse_instruction(line)
            if instruction is not None and name:
                self._computations[name][instruction.name] = instruction
                if line.lstrip().startswith("ROOT "):
                    self._roots[name] = instruction.name

    def collectives(self) -> dict[str, int]:
        """Counts the calls of collectives by kind."""
        counts: Counter[str] = Counter()
        for instruction, calls in self._walk(self._entry, 1):
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                counts[kind] += calls
        return dict(counts)

    def moves(self) -> list[Move]:
        """Lists what moves values without computing with them, the most bytes first.

        These are copies, concatenations, transpositions and slices, conversions from int8, and the
        fusions of nothing else. A fusion that also computes, and a matrix product that reads a
        slice where it lies, move nothing beyond what they have to read. Of a conditional's branches
        only the one that moves least is listed, which every step does: the others belong to
        sampling options.
        """
        return sorted(self._moves(self._entry, 1), key=lambda move: -move.total_bytes)

    def trip_count(self, loop: str) -> int:
        """How often the loop of that name turns; 1 if it has no known trip count."""
        found = (loops[loop] for loops in self._computations.values() if loop in loops)
        return max((instruction.num_calls for instruction in found), default=1)

    def _walk(self, computation: str, calls: int) -> Iterator[tuple[Instruction, int]]:
        """All instructions that run, with the number of their calls.

        Those in fusions are among them: XLA wraps collectives for which it has its own kernel.
        """
        for instruction in self._computations.get(computation, {}).values():
            yield instruction, calls
            for called in instruction.called:
                yield from self._walk(called, calls * instruction.num_calls)

    def _moves(self, computation: str, calls: int) -> list[Move]:
        moves = []
        for instruction in self._computations.get(computation, {}).values():
            num_bytes = self._moved_bytes(computation, instruction)
            if num_bytes:
                moves.append(Move(instruction.line, num_bytes, calls))
            if instruction.opcode in _FUSIONS:
                continue
            inside = [self._moves(at, calls * instruction.num_calls) for at in instruction.called]
            if instruction.opcode == "conditional":
                inside = [min(inside, key=lambda branch: sum(m.total_bytes for m in branch))]
            moves += [move for each in inside for move in each]
        return moves

    def _moved_bytes(self, computation: str, instruction: Instruction) -> int:
        """Bytes that an instruction reads and writes only to move them."""
        if instruction.opcode in _FUSIONS and instruction.called:
            inside = instruction.called[0]
            root = self._computations[inside][self._roots[inside]]
            roots = root.operands if root.opcode == "tuple" else (root.name,)
            return sum(self._moved_by(inside, name) for name in roots)
        is_move = self._is_move(computation, instruction)
        return self._own_bytes(computation, instruction) if is_move else 0

    def _is_move(self, computation: str, instruction: Instruction) -> bool:
        if instruction.opcode != "convert":
            return instruction.opcode in _MOVING
        source = self._computations[computation].get(instruction.operands[0])
        return source is not None and source.shape.startswith("s8[")

    def _moved_by(self, computation: str, root: str) -> int:
        """Bytes that a fusion moves for one of its results; 0 where it computes or fills it."""
        instructions = self._computations[computation]
        pending, seen, reads, moves = [root], set(), False, False
        while pending:
            name = pending.pop()
            if name in seen or name not in instructions:
                continue
            seen.add(name)
            instruction = instructions[name]
            if instruction.opcode == "parameter":
                reads = True
            elif (is_move := self._is_move(computation, instruction)) or (
                instruction.opcode in _TRANSPARENT
            ):
                moves |= is_move
                pending += [
                    operand
                    for operand in instruction.operands
                    if operand in instructions and not instructions[operand].is_scalar
                ]
            elif instruction.opcode not in ("constant", "broadcast", "iota"):
                return 0
        result = instructions[root]
        while result.opcode == "bitcast":
            result = instructions[result.operands[0]]
        return self._own_bytes(computation, result) if reads and moves else 0

    def _own_bytes(self, computation: str, instruction: Instruction) -> int:
        """Twice the bytes of the result; of an update in place, twice those of the update."""
        if instruction.opcode == "dynamic-update-slice":
            update = self._computations[computation].get(instruction.operands[1])
            return 2 * update.num_bytes if update else 0
        if instruction.opcode == "copy-start":  # (destination, source, context)
            return 2 * _bits(*_SHAPE.findall(instruction.shape)[0]) // 8
        return 2 * instruction.num_bytes


def parse_instruction(line: str) -> Instruction | None:
    """Parses a line such as `%name = f32[8]{0} opcode(%operand), attribute=value`."""
    found = re.match(r"\s+(?:ROOT )?%([\w.\-]+) = ", line)
    if not found:
        return None
    rest = line[found.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    # A tuple is followed by nothing else, other shapes by a layout that has been read with them.
    opening = rest.index("(")
    closing = _closing(rest, opening)
    called = []
    for one, several in _CALLED.findall(rest[closing:]):
        called += [one] if one else _NAME.findall(several)
    operands = tuple(_NAME.findall(rest[opening:closing]))
    return Instruction(found.group(1), shape, rest[:opening], operands, tuple(called), line.strip())


def _closing(text: str, opening: int) -> int:
    """The index of the parenthesis that closes the one at `opening`."""
    depth = 0
    for index in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index
    raise ValueError(f"no closing parenthesis in {text[:80]!r}")


def _bits(kind: str, bits: str, dims: str) -> int:
    return (8 if kind == "pred" else int(bits)) * prod(int(dim) for dim in dims.split(",") if dim)
