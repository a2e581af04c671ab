"""Compares the sampled tokens of all hosts by digests, so that no host can differ unnoticed."""

import hashlib
from collections import OrderedDict

from fairkv_jax.engine.schedule_log import tokens_of
from fairkv_jax.engine.scheduler_output import ExecutionResult, SchedulerOutput
from fairkv_jax.hosts.messages import Compare

COMPARED_OUTPUTS = 64
"""Outputs whose tokens are compared at a time."""


class Comparison:
    """The digests of what a host has sampled since the last comparison."""

    def __init__(self) -> None:
        self._digests: OrderedDict[int, bytes] = OrderedDict()
        """By the index of the output."""

    def add(self, output: SchedulerOutput, result: ExecutionResult) -> None:
        """Adds the tokens that an output produced."""
        text = repr(tokens_of(output, result))
        self._digests[output.index] = hashlib.sha256(text.encode()).digest()

    def take(self) -> Compare | None:
        """Returns what the leader sends to the followers, when it has enough outputs."""
        if len(self._digests) < COMPARED_OUTPUTS:
            return None
        message = Compare(list(self._digests), self._digest(list(self._digests)))
        self._digests.clear()
        return message

    def agrees(self, leaders: Compare) -> bool:
        """Returns whether the tokens of the leader's outputs were the same here.

        The digests up to the last of these outputs are dropped: the leader has not read those that
        it does not name.
        """
        known = all(index in self._digests for index in leaders.indices)
        agrees = known and self._digest(leaders.indices) == leaders.digest
        for index in [each for each in self._digests if each <= leaders.indices[-1]]:
            del self._digests[index]
        return agrees

    def _digest(self, indices: list[int]) -> bytes:
        return hashlib.sha256(b"".join(self._digests[index] for index in indices)).digest()
