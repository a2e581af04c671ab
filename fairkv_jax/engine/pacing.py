"""How much work goes to the devices at a time: steps of decoding, and units of a prefill."""

from fairkv_jax.decode import MAX_STEPS

_DISPATCH_SECONDS = 0.04
"""Decoding that is dispatched at once: as long as this a new request may have to wait."""
_STALL = 1.25
"""Decode steps' time that a part of a prefill may take between two of them."""
_PREFILL_SECONDS = 0.25
"""A part of a prefill when nobody decodes: as long as this a cancelled request goes on."""
_MEMORY = 0.7
"""Weight of what was measured before in a running mean."""


class Pacer:
    """Running means of what a decode step and a unit of prefill take; none are assumed at first."""

    def __init__(self) -> None:
        self._step_seconds: float | None = None
        self._work_per_second: float | None = None

    @property
    def num_steps(self) -> int:
        """Decode steps of a dispatch where nobody waits."""
        if not self._step_seconds:
            return 1
        return max(1, min(MAX_STEPS, int(_DISPATCH_SECONDS / self._step_seconds)))

    def prefill_work(self, *, is_alone: bool) -> float:
        """Work of a prefill's next part, beside running requests or alone, in units of `prefilled`.

        0, which stands for the least that there is, as long as nothing was measured.
        """
        seconds = _PREFILL_SECONDS if is_alone else _STALL * (self._step_seconds or 0.0)
        return seconds * (self._work_per_second or 0.0)

    def decoded(self, num_steps: int, seconds: float) -> None:
        """Takes note of steps that had the devices for themselves."""
        self._step_seconds = _mean(self._step_seconds, seconds / num_steps)

    def prefilled(self, work: float, num_steps: int, seconds: float) -> None:
        """Takes note of a part of a prefill, and of the decode steps that came with it."""
        seconds -= num_steps * (self._step_seconds or 0.0)
        if seconds > 0:
            self._work_per_second = _mean(self._work_per_second, work / seconds)


def _mean(before: float | None, now: float) -> float:
    return now if before is None else _MEMORY * before + (1 - _MEMORY) * now
