"""Times functions alternately in one process, so that noise affects all of them equally."""

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import jax


def median_ms(
    runs: Mapping[str, Callable[[], Any]], repeats: int, before: Callable[[], None] | None = None
) -> dict[str, float]:
    """Returns the median milliseconds of each function, after one untimed call of each.

    `before` is called before every timed call and is not timed.
    """
    for run in runs.values():
        jax.block_until_ready(run())
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            if before is not None:
                before()
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * median(values) for name, values in seconds.items()}
