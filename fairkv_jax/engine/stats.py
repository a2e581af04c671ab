"""Statistics of the engine and of requests."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PrefixStats:
    """The prefixes whose cache is there."""

    count: int
    bytes: int
    """What their pages take over all devices; pages that several hold count once."""
    copied_bytes: int
    """The part of it that copies of heads on further devices take."""
    sharing: float
    """Mean number of running requests that begin with the same prefix; 0 where none does."""


@dataclass(frozen=True)
class RetainedPrefix:
    """A prefix whose cache is there."""

    num_tokens: int
    """Also those that compression has dropped."""
    kept_tokens: float
    """Per head, on average."""
    bytes: int
    """What its pages take over all devices."""
    num_requests: int
    """Requests that use it."""


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
    prefixes: PrefixStats | None = None
    """None: the engine does not cache prefixes."""


@dataclass
class RequestMetrics:
    """Times of a request in seconds of `time.monotonic`; None if the event has not happened."""

    arrival_time: float
    first_scheduled_time: float | None = None
    """Start of the prefill."""
    prefill_finished_time: float | None = None
    """Time of the first token."""
    last_token_time: float | None = None
