"""Result rows, and the file to which they are appended as they are obtained."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

IN_VIEW, AFTER = "in_view", "after"
PROTOCOLS = (IN_VIEW, AFTER)
"""Whether a question is in the prompt that is compressed, or follows the compressed document."""
FULL = "full"
"""The method that keeps everything, with which the others are compared."""


@dataclass(frozen=True)
class Cell:
    """What one figure of a sweep is measured for."""

    task: str
    method: str
    ratio: float | None
    """The fraction that is removed; None for full."""
    question: str | None
    """`IN_VIEW` or `AFTER`; None for full, where both give the same tokens."""
    length: int | None
    """Tokens of the prompts at most; None for the user's own questions."""


@dataclass(frozen=True)
class Row:
    """The result of one question, or the likelihood of one text."""

    setup: str
    """A hash of everything else that the result depends on, see `Results.add_setup`."""
    task: str
    method: str
    ratio: float | None
    question: str | None
    length: int | None
    seed: int
    sample: int
    """Index of the document."""
    index: int
    """Index of the question among those of its document."""
    score: float
    """Recall in [0, 1]; for the tasks nll and kl, nats per token."""
    kept: float
    """Fraction of the prompt's, or in `AFTER` of the document's, tokens that a head keeps."""
    depth: float | None = None
    output: str = ""
    """The beginning of what the model wrote."""

    @property
    def cell(self) -> Cell:
        return Cell(self.task, self.method, self.ratio, self.question, self.length)

    @property
    def key(self) -> tuple[Any, ...]:
        """Rows with equal keys are results of the same measurement."""
        return (self.setup, self.cell, self.seed, self.sample, self.index)


class Results:
    """The rows in a folder's results.jsonl; an interrupted sweep finds there what it has done.

    Raises:
        ValueError: the folder cannot be written, or the file is not one of results.
    """

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / "results.jsonl"
        self.rows: dict[tuple[Any, ...], Row] = {}
        self.setups: dict[str, dict[str, Any]] = {}
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.path.touch()
            content = self.path.read_bytes()
        except OSError as error:
            raise ValueError(f"cannot write results to --output {folder}: {error}") from error
        whole, _, partial = content.rpartition(b"\n")
        if partial:  # a line that an interruption has cut
            os.truncate(self.path, len(content) - len(partial))
        for number, line in enumerate(whole.splitlines(), 1):
            self._read(number, line)

    def add_setup(self, setup: str, values: dict[str, Any]) -> None:
        """Records once in the file what a row's `setup` stands for."""
        if setup not in self.setups:
            self.setups[setup] = values
            self._append([{"setup": setup, "values": values}])

    def add(self, rows: Iterable[Row]) -> None:
        """Appends rows to the file, all at once."""
        rows = list(rows)
        self._append([asdict(row) for row in rows])
        self.rows |= {row.key: row for row in rows}

    def _append(self, records: list[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(record) + "\n" for record in records)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(lines)

    def _read(self, number: int, line: bytes) -> None:
        try:
            record = json.loads(line)
            if "values" in record:
                self.setups[record["setup"]] = record["values"]
            else:
                row = Row(**record)
                self.rows[row.key] = row
        except (ValueError, TypeError) as error:
            names = ", ".join(each.name for each in fields(Row))
            raise ValueError(
                f"line {number} of {self.path} is not a result ({names}): move the file away, or "
                "give another --output"
            ) from error
