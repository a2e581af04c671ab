"""Who waits, who runs in which row, and who goes first when there is no room."""

from collections import deque

from fairkv_jax.engine.sequence import Sequence


class Scheduler:
    """First come, first served; under pressure the newest gives way to the oldest."""

    def __init__(self, num_rows: int):
        self.waiting: deque[Sequence] = deque()
        self.running: dict[int, Sequence] = {}  # by row
        self._free_rows = list(range(num_rows))

    def __len__(self) -> int:
        return len(self.waiting) + len(self.running)

    @property
    def has_free_row(self) -> bool:
        return bool(self._free_rows)

    @property
    def num_rows(self) -> int:
        """Rows of the batch up to the last one that is in use."""
        return max(self.running, default=-1) + 1

    def has(self, request_id: str) -> bool:
        """Whether the request waits or runs."""
        sequences = [*self.waiting, *self.running.values()]
        return any(sequence.request.request_id == request_id for sequence in sequences)

    @property
    def first_waiting(self) -> Sequence | None:
        """Who would start next, if anybody waits and there is a row."""
        return self.waiting[0] if self.waiting and self._free_rows else None

    @property
    def free_row(self) -> int:
        """The lowest free row, so that the batch stays short."""
        return min(self._free_rows)

    def start(self) -> None:
        """Gives the first that waits the free row."""
        row = self.free_row
        self._free_rows.remove(row)
        self.running[row] = self.waiting.popleft()

    def wait_first(self, sequence: Sequence) -> None:
        """Puts a sequence before all that wait; only the first of them holds a prefill."""
        if self.waiting:
            self.waiting[0].prefill = None
        self.waiting.appendleft(sequence)

    def stop(self, row: int) -> Sequence:
        """Takes a sequence off its row."""
        self._free_rows.append(row)
        return self.running.pop(row)

    def newest(self) -> int:
        """The row of the running sequence that came last."""
        return max(self.running, key=lambda row: self.running[row].arrival)

    def drop_waiting(self, request_id: str) -> Sequence | None:
        """Takes a request out of the queue, if it is there."""
        for sequence in self.waiting:
            if sequence.request.request_id == request_id:
                self.waiting.remove(sequence)
                return sequence
        return None

    def row_of(self, request_id: str) -> int | None:
        """The row in which a request runs, if it does."""
        for row, sequence in self.running.items():
            if sequence.request.request_id == request_id:
                return row
        return None
