"""Statistics of the engine and of requests."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineStats:
    """The state of the engine after a step."""

    num_running: int
    num_waiting: int
    num_preemptions: int
    """Preemptions since the start."""
    used_pages: tuple[int, ...]
    """Used KV pages per device."""
    pages_per_device: int
    kv_tokens: tuple[int, ...]
    """Cached tokens per device, summed over layers and heads."""
    compilations: int
    """Programs that JAX has compiled, or read from its cache, since the start."""


@dataclass
class RequestMetrics:
    """Times of a request in seconds of `time.monotonic`; None if the event has not happened."""

    arrival_time: float
    first_scheduled_time: float | None = None
    """Start of the prefill."""
    prefill_finished_time: float | None = None
    """Time of the first token."""
    last_token_time: float | None = None
