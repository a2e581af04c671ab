"""What the engine is doing, and when it did what for a request."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineStats:
    """The engine between two steps; lists have an entry a device."""

    num_running: int
    num_waiting: int
    num_preemptions: int
    """Since the start."""
    used_pages: tuple[int, ...]
    pages_per_device: int
    kv_tokens: tuple[int, ...]
    """Cached tokens, summed over layers and heads."""
    compilations: int
    """Programs that JAX has compiled, or read from its cache, since the start."""


@dataclass
class RequestMetrics:
    """When things happened to a request, in `time.monotonic` seconds; None: not yet."""

    arrival_time: float
    first_scheduled_time: float | None = None
    """Its prefill began."""
    prefill_finished_time: float | None = None
    """Its first token was there."""
    last_token_time: float | None = None
