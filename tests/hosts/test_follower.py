"""A follower executes what its leader did, in no more memory."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fairkv_jax.engine.execution import PendingPrefill
from fairkv_jax.engine.model_runner import ModelRunner
from fairkv_jax.engine.scheduler_output import SchedulerOutput
from fairkv_jax.hosts.follower import _Executor
from fairkv_jax.hosts.messages import Execute
from tests.engine.drive import greedy, random_prompt, request, run
from tests.engine.logged import logged_engine


def test_it_holds_no_more_compressed_prompts_than_the_leader(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The pool is sized for the leader, which reads a prompt's results before it goes on."""
    alive, most, outputs, arguments = set(), [0], [], []

    class Counted(PendingPrefill):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            alive.add(id(self))

        def __del__(self):
            alive.discard(id(self))

    class Recorded(ModelRunner):
        def __init__(self, *args: Any, **kwargs: Any):
            arguments.append((args, kwargs))
            super().__init__(*args, **kwargs)

        def execute(self, output: SchedulerOutput) -> Any:
            outputs.append(output)
            return super().execute(output)

        def start_prefill(self, *args: Any, **kwargs: Any) -> Any:
            most[0] = max(most[0], len(alive))
            return super().start_prefill(*args, **kwargs)

    monkeypatch.setattr("fairkv_jax.engine.model_runner.PendingPrefill", Counted)
    engine = logged_engine(tiny_checkpoint, tmp_path / "log", make_runner=Recorded)
    run(engine, [request(str(i), random_prompt(110, seed=i), greedy(8)) for i in range(6)])
    engine.close()
    leaders, most[0] = most[0], 0
    (args, kwargs), followed = arguments[0], list(outputs)
    watch: Any = SimpleNamespace(step=nullcontext)
    executor = _Executor(Recorded(*args, **kwargs), watch, 1)
    for output in followed:
        executor.take(Execute(output))
    assert len(followed) == len(outputs) / 2
    assert most[0] <= leaders
