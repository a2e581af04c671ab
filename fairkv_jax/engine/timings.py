"""Measures how long decode steps and prefills take; the scheduler takes the results as input."""

from dataclasses import dataclass

from fairkv_jax.engine.scheduler_output import SchedulerOutput

_SMOOTHING = 0.7
"""Weight of earlier measurements in a running mean."""


@dataclass(frozen=True)
class Timings:
    """What the scheduler knows of the devices' speed; None: not measured yet."""

    step_seconds: float | None = None
    """Seconds of one decode step."""
    prefill_work_per_second: float | None = None
    """Multiply-adds of a prefill per second, in the unit of `PrefillChunks.work`."""


class StepTimer:
    """Running means of what executions take."""

    def __init__(self) -> None:
        self.timings = Timings()
        self._last_end = 0.0
        self._seconds_per_work: float | None = None

    def record(self, output: SchedulerOutput, start: float | None, end: float) -> None:
        """Records an execution that was dispatched at `start` and read at `end`.

        Times are in seconds. `start` is None for an execution that included compiling, which is
        left out, as are executions that compress rows again. The devices are busy with one
        execution after the other.
        """
        previous, self._last_end = self._last_end, end
        if start is None or output.compressions:
            return
        seconds = end - max(start, previous)
        num_steps = output.decode.num_steps if output.decode is not None else 0
        step = self.timings.step_seconds
        if output.prefill is not None:
            # The mean of times, not of rates: where chunks and steps run side by side, single
            # executions seem to take almost no time, and others twice theirs.
            seconds = max(seconds - num_steps * (step or 0.0), 0.0)
            self._seconds_per_work = _running_mean(
                self._seconds_per_work, seconds / output.prefill.work
            )
        elif num_steps:
            step = _running_mean(step, seconds / num_steps)
        self.timings = Timings(step, 1 / self._seconds_per_work if self._seconds_per_work else None)


def _running_mean(before: float | None, now: float) -> float:
    return now if before is None else _SMOOTHING * before + (1 - _SMOOTHING) * now
