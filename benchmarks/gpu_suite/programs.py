"""Programs compiled side by side, and timed one after another."""

import time
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

import jax
from jax.stages import Lowered

QUEUED = 4
COMPILERS = 8
LONGEST_SECONDS = 1.5
"""Mean time for timing one program after which no further repeat begins."""
_LONG_CALL = 0.05
_VERY_LONG_CALL = 0.5

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


@dataclass(frozen=True)
class Seconds:
    """The duration of a call."""

    wall: float
    cpu: float
    """CPU time of all threads of the process, which other programs' load changes little."""


def seconds_of(call: Callable[..., Any], args: tuple[Any, ...], repeats: int) -> float:
    """Median seconds of a compiled call, see `interleaved`."""
    return interleaved({"": lambda: call(*args)}, repeats)[""].wall


def interleaved(calls: Mapping[Key, Callable[[], Any]], repeats: int) -> dict[Key, Seconds]:
    """Median duration of several calls that are made in turn, so that drift affects all equally.

    Calls that are not counted come first. Short calls are queued a few at a time, so that the
    host's part of one hides behind another. At least half of the repeats are made, at least one.
    """
    queued = {key: _warm(call) for key, call in calls.items()}
    times: dict[Key, list[Seconds]] = {key: [] for key in calls}
    begin = time.perf_counter()
    for repeat in range(repeats):
        for key, call in calls.items():
            times[key].append(timed(call, queued[key]))
        enough = time.perf_counter() - begin > LONGEST_SECONDS * len(calls)
        if enough and 2 * (repeat + 1) >= repeats:
            break
    return {
        key: Seconds(median(each.wall for each in found), median(each.cpu for each in found))
        for key, found in times.items()
    }


def timed(call: Callable[[], Any], queued: int = 1) -> Seconds:
    """The mean duration of a few calls that are queued together."""
    out = None
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(queued):
        out = call()
    jax.block_until_ready(out)
    cpu = time.process_time() - cpu
    return Seconds((time.perf_counter() - wall) / queued, cpu / queued)


def _warm(call: Callable[[], Any]) -> int:
    """Makes calls that are not counted, and returns how many to queue together."""
    if timed(call).wall > _VERY_LONG_CALL:
        return 1
    return QUEUED if timed(call).wall < _LONG_CALL else 1


def said(error: Exception) -> str:
    """An error in a table's cell."""
    return f"{type(error).__name__}: {str(error)[:200]}".replace("\n", " ")
