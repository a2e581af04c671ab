"""Samples of the server's metrics over the last five minutes, which the live page draws."""

import asyncio
import time
from collections import deque
from dataclasses import asdict, dataclass, replace

from fairkv_jax.serve.metrics import Metrics, Totals

INTERVAL_S = 1.0
LENGTH = 300
"""Number of samples that are kept."""


@dataclass(frozen=True)
class Sample:
    """The server's metrics at one time; rates and means are since the previous sample."""

    number: int
    """Consecutive numbers that start at 1."""
    time: float
    """Unix time, in seconds."""
    running: int
    waiting: int
    prompt_tokens_per_s: float
    generation_tokens_per_s: float
    first_token_ms: float | None
    """Mean time to first token; None: no request generated its first token."""
    interval_ms: float | None
    """Mean inter-token latency; None: no token was generated."""
    used_pages: tuple[int, ...]
    """Used KV pages per device; empty until the engine is ready."""
    kv_tokens: tuple[int, ...]
    """Cached tokens per device, summed over layers and heads; empty until the engine is ready."""


class History:
    """Samples the metrics and keeps the last `LENGTH` samples."""

    def __init__(self, metrics: Metrics):
        self._metrics = metrics
        self._samples: deque[Sample] = deque(maxlen=LENGTH)
        self._before: Totals = replace(metrics.totals)
        self._number = 0
        self._clock = time.monotonic()

    async def record(self) -> None:
        """Takes a sample per second until the task is cancelled."""
        while True:
            self.take(time.monotonic())
            await asyncio.sleep(INTERVAL_S)

    def take(self, clock: float) -> None:
        """Takes one sample. `clock` is the current monotonic time in seconds."""
        metrics, before = self._metrics, self._before
        now = replace(metrics.totals)
        seconds = max(clock - self._clock, 1e-9)
        self._before, self._clock = now, clock
        self._number += 1
        stats = metrics.stats
        sample = Sample(
            number=self._number,
            time=round(time.time(), 3),
            running=metrics.num_running,
            waiting=metrics.num_waiting,
            prompt_tokens_per_s=round((now.prompt_tokens - before.prompt_tokens) / seconds, 2),
            generation_tokens_per_s=round(
                (now.generation_tokens - before.generation_tokens) / seconds, 2
            ),
            first_token_ms=_mean_ms(
                now.first_token_seconds - before.first_token_seconds, now.prompts - before.prompts
            ),
            interval_ms=_mean_ms(
                now.interval_seconds - before.interval_seconds, now.intervals - before.intervals
            ),
            used_pages=stats.used_pages if stats else (),
            kv_tokens=stats.kv_tokens if stats else (),
        )
        self._samples.append(sample)

    def since(self, number: int) -> list[dict]:
        """Returns the samples whose number is larger, oldest first."""
        return [asdict(sample) for sample in self._samples if sample.number > number]


def _mean_ms(seconds: float, count: int) -> float | None:
    return round(1e3 * seconds / count, 3) if count else None
