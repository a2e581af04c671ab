"""What the hosts of a group tell each other, as plain data.

follower ──► leader     Joined, Accepted, Refused, WarmedUp, Heartbeat, Failed, Stopped
leader ──► followers    Start, WarmUp, Execute, Compare, Heartbeat, Stop
"""

from dataclasses import dataclass
from typing import Any

from fairkv_jax.compress.instruction import RepeatInstruction
from fairkv_jax.config import EngineConfig, KVConfig
from fairkv_jax.engine.schedule_log import LOGGED_CLASSES
from fairkv_jax.engine.scheduler_output import SchedulerOutput
from fairkv_jax.hosts.codec import Codec
from fairkv_jax.plan import HeadScores


@dataclass(frozen=True)
class Joined:
    """A follower has opened its checkpoint."""

    memory_bytes: int | None
    """What XLA may take of its smallest device; None: unknown."""


@dataclass(frozen=True)
class Start:
    """The first message: what all hosts must agree on, and what the leader has chosen."""

    engine_config: EngineConfig
    kv_config: KVConfig
    plan: str
    """The head plan as JSON, see `Plan.to_json`."""
    pages_per_device: int
    device_kind: str
    """JAX's name of the leader's devices, such as "NVIDIA H100 80GB HBM3"."""
    fingerprint: str
    """Identifies the checkpoint, see `schedule_log.fingerprint`."""
    eos_token_ids: tuple[int, ...]
    instruction: RepeatInstruction | None


@dataclass(frozen=True)
class Accepted:
    """A follower agrees with `Start`, and has loaded the model."""


@dataclass(frozen=True)
class Refused:
    """A follower does not agree with `Start`."""

    reason: str


@dataclass(frozen=True)
class WarmUp:
    """Asks the followers to compile what `ModelRunner.warm_up` does with these arguments."""

    prompt_lengths: list[int]
    num_rows: int
    suffix_lengths: list[int]
    prompt_logprobs: bool
    forks: bool


@dataclass(frozen=True)
class WarmedUp:
    """A follower has compiled what `WarmUp` asked for."""


@dataclass(frozen=True)
class Execute:
    """Asks the followers to execute a scheduler output."""

    output: SchedulerOutput


@dataclass(frozen=True)
class Compare:
    """Asks the followers to compare a digest of their sampled tokens with the leader's."""

    indices: list[int]
    digest: bytes


@dataclass(frozen=True)
class Heartbeat:
    """Sent regularly, so that silence means that a host or its network has failed."""


@dataclass(frozen=True)
class Failed:
    """A follower ends because of an error."""

    reason: str


@dataclass(frozen=True)
class Stopped:
    """A follower ends because it was told to stop."""


@dataclass(frozen=True)
class Stop:
    """Tells the followers to end, and why."""

    has_failed: bool
    """Whether they end because of an error."""
    reason: str


_CLASSES = (
    Joined,
    Start,
    Accepted,
    Refused,
    WarmUp,
    WarmedUp,
    Execute,
    Compare,
    Heartbeat,
    Failed,
    Stopped,
    Stop,
    EngineConfig,
    KVConfig,
    HeadScores,
    RepeatInstruction,
    *LOGGED_CLASSES,
)
_CODEC = Codec(_CLASSES)


def pack(number: int, message: Any) -> bytes:
    """Returns a message with its number as bytes."""
    return _CODEC.pack([number, message])


def unpack(data: bytes) -> tuple[int, Any]:
    """Returns a number and the message that was packed with it.

    Raises:
        ValueError: the bytes are not a message.
    """
    number, message = _CODEC.unpack(data)
    return number, message
