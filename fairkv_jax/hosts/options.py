"""The options of a model over several hosts, and how a scheduler's environment sets them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fairkv_jax.options import option, options_of

DEFAULT_PORT = 8476
"""Port of the coordinator where none is given; JAX uses the same on Kubernetes."""

_GROUP = "Several hosts"
_LWS_SIZE, _LWS_INDEX, _LWS_LEADER = "LWS_GROUP_SIZE", "LWS_WORKER_INDEX", "LWS_LEADER_ADDRESS"
_SLURM_SIZE, _SLURM_INDEX = "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", _SLURM_SIZE, _SLURM_INDEX)
"""Variables of a task of a Slurm step. The shell of `salloc` has them too, as a step of one task;
SLURM_NTASKS is that of the job."""


@dataclass(frozen=True)
class HostOptions:
    """How many hosts share one model, and which of them this process is.

    Raises:
        ValueError: a number lies outside its limits, or the coordinator is not an address.
    """

    num_hosts: int = option(
        1,
        "Number of hosts that share one model; each runs this command with a host index of its "
        "own. More than 1 needs the packages of the extra `hosts`.",
        group=_GROUP,
        user_default=None,
        default_text="$LWS_GROUP_SIZE, the tasks of the Slurm step, or 1",
    )
    host_index: int = option(
        0,
        "Index of this host. Host 0 leads: it serves HTTP, the others execute what it schedules.",
        group=_GROUP,
        user_default=None,
        default_text="$LWS_WORKER_INDEX, the task of the Slurm step, or 0",
    )
    coordinator: str | None = option(
        None,
        f"Address of host 0, HOST:PORT, that the others reach; the port is {DEFAULT_PORT} unless "
        "it is given.",
        group=_GROUP,
        default_text="$LWS_LEADER_ADDRESS, or the first node of the Slurm step",
    )
    host_timeout: float = option(
        10.0,
        "Seconds without a message from a host after which all hosts exit.",
        group=_GROUP,
    )

    def __post_init__(self) -> None:
        if self.num_hosts < 1:
            raise ValueError(f"--num-hosts must be at least 1, got {self.num_hosts}")
        if not 0 <= self.host_index < self.num_hosts:
            raise ValueError(
                f"--host-index must be between 0 and {self.num_hosts - 1}, one less than "
                f"--num-hosts, got {self.host_index}"
            )
        if not 1 <= self.host_timeout <= 3600:
            raise ValueError(
                f"--host-timeout must be between 1 and 3600 seconds, got {self.host_timeout}"
            )
        if self.coordinator is not None:
            split_address(self.coordinator)

    @property
    def is_leader(self) -> bool:
        return self.host_index == 0


HOST_OPTIONS = options_of(HostOptions)


def host_options(given: Mapping[str, Any], environ: Mapping[str, str]) -> HostOptions:
    """Returns the options of this host.

    What is not given comes from the environment of LeaderWorkerSet, or else of Slurm. Slurm's
    coordinator is left to JAX.

    Args:
        given: the options by name; None for those that are not given.

    Raises:
        ValueError: see `HostOptions`; or a variable is not a number, or there are several hosts
            and neither an option nor a variable names the coordinator.
    """
    size, index, coordinator, is_slurm = 1, 0, None, False
    if _LWS_SIZE in environ:
        size, index = _number(environ, _LWS_SIZE, 1), _number(environ, _LWS_INDEX, 0)
        coordinator = environ.get(_LWS_LEADER)
    elif all(name in environ for name in _SLURM):
        is_slurm = True
        size, index = (
            _number(environ, "SLURM_STEP_NUM_TASKS", 1),
            _number(environ, "SLURM_PROCID", 0),
        )
    if given["num_hosts"] is not None:
        if given["num_hosts"] != size:
            index = 0  # the environment speaks of another group
        size = given["num_hosts"]
    options = HostOptions(
        size,
        index if given["host_index"] is None else given["host_index"],
        given["coordinator"] or coordinator,
        given["host_timeout"],
    )
    if size > 1 and options.coordinator is None and not is_slurm:
        raise ValueError(
            f"--num-hosts {size} needs the address of host 0: give it as --coordinator HOST:PORT, "
            f"the same on all hosts"
        )
    return options


def split_address(address: str) -> tuple[str, int]:
    """Returns the host and the port of `HOST`, `HOST:PORT`, or `[IPv6]:PORT`.

    Raises:
        ValueError: the port is not a number between 1 and 65535, or IPv6 lacks its brackets.
    """
    host, colon, port = address.rpartition(":")
    if not colon or address.endswith("]"):
        host, port = address, str(DEFAULT_PORT)
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ValueError(
            f"--coordinator must have brackets around an IPv6 address, [HOST]:PORT, got {address!r}"
        )
    if not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise ValueError(f"--coordinator must be HOST:PORT, got {address!r}")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    value = environ.get(name, str(default))
    if not value.isdecimal():
        raise ValueError(f"${name} must be a number, got {value!r}: give the option instead")
    return int(value)
