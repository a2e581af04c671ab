"""What the scheduler is told of the devices' speed."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from fairkv_jax.engine.execution import Execution
from fairkv_jax.engine.page_tables import PageTableUpdate
from fairkv_jax.engine.scheduler_output import Decode, PrefillChunks, SchedulerOutput
from fairkv_jax.engine.timings import StepTimer
from fairkv_jax.sampling import Sampled

NONE = np.zeros(0, np.int64)
STEP = SchedulerOutput(
    0, False, (), (), (), PageTableUpdate(NONE, NONE, NONE, NONE), None, None, Decode((), 1, {})
)
BOTH = replace(STEP, prefill=PrefillChunks("", 0, 1, 2, work=600.0, new_request=None))


def test_the_rate_is_that_of_the_whole_time():
    """Executions that seem to take almost no time beside their steps do not raise it."""
    timer, end = StepTimer(), 0.0
    for seconds in (0.05,) * 9:
        timer.record(STEP, end, end := end + seconds)
    assert timer.timings.step_seconds == pytest.approx(0.05)
    for seconds in (0.0501, 0.1699) * 20:  # 0.06 s of chunks on average
        timer.record(BOTH, end, end := end + seconds)
    rate = timer.timings.prefill_work_per_second
    assert rate is not None
    assert 600 / 0.08 < rate < 600 / 0.04


def test_compiling_is_not_counted():
    timer = StepTimer()
    timer.record(STEP, None, 100.0)
    assert timer.timings.step_seconds is None
    timer.record(STEP, 0.0, 100.5)
    assert timer.timings.step_seconds == pytest.approx(0.5)


def test_a_result_waits_for_the_chunks_as_well():
    """On CPU they run beside the step; nobody else would wait for them."""

    class Progress:
        is_awaited = False

        def block_until_ready(self) -> "Progress":
            self.is_awaited = True
            return self

    zeros = jnp.zeros((1, 1), jnp.int32)
    progress = Progress()
    Execution(BOTH, False, Sampled(*[zeros] * 5), None, progress).result()
    assert progress.is_awaited
