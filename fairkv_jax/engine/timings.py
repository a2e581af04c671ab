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

    def record(self, output: SchedulerOutput, start: float | None, end: float) -> None:
        """Records an execution that was dispatched at `start` and read at `end`.

        Times are in seconds. `start` is None for an execution that included compiling, which is
        left out. The devices are busy with one execution after the other.
        """
        previous, self._last_end = self._last_end, end
        if start is None:
            return
        seconds = end - max(start, previous)
        num_steps = output.decode.num_steps if output.decode is not None else 0
        step, rate = self.timings.step_seconds, self.timings.prefill_work_per_second
        if output.prefill is not None:
            seconds -= num_steps * (step or 0.0)
            if seconds > 0:
                rate = _running_mean(rate, output.prefill.work / seconds)
        elif num_steps:
            step = _running_mean(step, seconds / num_steps)
        self.timings = Timings(step, rate)


def _running_mean(before: float | None, now: float) -> float:
    return now if before is None else _SMOOTHING * before + (1 - _SMOOTHING) * now
