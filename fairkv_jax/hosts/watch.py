"""How a host notices that another one is silent, or that a step does not end."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

POLL_S = 0.2
"""Maximum time to wait for a message before the times are checked again."""
_HEARTBEATS_PER_TIMEOUT = 5


class Heart:
    """Says when the next heartbeat is due."""

    def __init__(self, host_timeout_s: float):
        self._interval_s = host_timeout_s / _HEARTBEATS_PER_TIMEOUT
        self._next = 0.0

    def is_due(self, now: float) -> bool:
        """Returns whether a heartbeat is to be sent now, which then counts as sent."""
        if now < self._next:
            return False
        self._next = now + self._interval_s
        return True


class StepTimer:
    """Follows how long a step takes; one thread runs steps, another checks."""

    def __init__(self, timeout_s: float):
        """`timeout_s` is the longest time that a step may take."""
        self._timeout_s = timeout_s
        self._began: float | None = None

    @contextmanager
    def step(self) -> Iterator[None]:
        """The body is a step."""
        self._began = time.monotonic()
        try:
            yield
        finally:
            self._began = None

    def check(self, now: float) -> None:
        """Raises TimeoutError if the current step has taken too long."""
        began = self._began
        if began is not None and now - began > self._timeout_s:
            raise TimeoutError(f"a step has taken {self._timeout_s:g} seconds (--stall-timeout)")
