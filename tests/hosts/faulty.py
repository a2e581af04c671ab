"""A follower with a fault, which $FAULT names: `python -m fairkv_jax.serve` with one thing changed.

stuck     a step never ends
raises    a step raises
differs   a step samples other tokens
skewed    its clocks are years ahead
"""

import faulthandler
import os
import sys
import time
from dataclasses import replace
from typing import Any

FAULT = os.environ["FAULT"]
HEALTHY_OUTPUTS = 5


def skew_clocks() -> None:
    for name in ("time", "monotonic", "perf_counter"):
        clock = getattr(time, name)
        setattr(time, name, lambda clock=clock: clock() + 3e8)


def break_runner() -> None:
    from fairkv_jax.engine import execution, model_runner

    execute, on_host = model_runner.ModelRunner.execute, execution._on_host

    def faulty(self: Any, output: Any) -> Any:
        if output.index >= HEALTHY_OUTPUTS:
            if FAULT == "stuck":
                time.sleep(1000)
            if FAULT == "raises":
                raise RuntimeError("a fault for the test")
        return execute(self, output)

    def other_tokens(sampled: Any) -> Any:
        read = on_host(sampled)
        return replace(read, tokens=read.tokens + 1)

    model_runner.ModelRunner.execute = faulty
    if FAULT == "differs":
        execution._on_host = other_tokens


if __name__ == "__main__":
    faulthandler.enable()
    if FAULT == "skewed":
        skew_clocks()
    import fairkv_jax.serve.__main__ as server

    if FAULT != "skewed":
        # The runner imports JAX, which reads the variables that `main` sets first.
        prepare = server._prepare_jax

        def prepare_and_break(options: Any) -> None:
            prepare(options)
            break_runner()

        server._prepare_jax = prepare_and_break
    sys.exit(server.main())
