"""Programs compiled side by side, and timed one after another."""

import time
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any, TypeVar

import jax
from jax.stages import Lowered

QUEUED = 4
COMPILERS = 8
LONGEST_SECONDS = 1.5
"""Time limit for timing one program, not counting its last call; it limits the number of calls."""
_LONG_CALL = 0.05

Key = TypeVar("Key", bound=Hashable)


def compile_all(
    programs: Mapping[Key, Callable[[], Lowered]],
) -> dict[Key, Callable[..., Any] | Exception]:
    """Each program compiled, or the error that it gave."""

    def compiled(lowered: Lowered | Exception) -> Any:
        if isinstance(lowered, Exception):
            return lowered
        try:
            return lowered.compile()
        except Exception as error:  # a peer that does not compile here must not end the suite
            return error

    with ThreadPoolExecutor(COMPILERS) as threads:
        lowered = [_lowered(program) for program in programs.values()]
        return dict(zip(programs, threads.map(compiled, lowered), strict=True))


def _lowered(program: Callable[[], Lowered]) -> Lowered | Exception:
    try:
        return program()
    except Exception as error:
        return error


def seconds_of(call: Callable[..., Any], args: tuple[Any, ...], repeats: int) -> float:
    """Median seconds of a compiled call, after two that are not counted.

    Short calls are queued a few at a time, so that the host's part of one hides behind another.
    """
    jax.block_until_ready(call(*args))
    begin = time.perf_counter()
    jax.block_until_ready(call(*args))
    queued = QUEUED if time.perf_counter() - begin < _LONG_CALL else 1
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(queued):
            out = call(*args)
        jax.block_until_ready(out)
        end = time.perf_counter()
        times.append((end - start) / queued)
        if end - begin > LONGEST_SECONDS:
            break
    return median(times)


def said(error: Exception) -> str:
    """An error in a table's cell."""
    return f"{type(error).__name__}: {str(error)[:200]}".replace("\n", " ")
