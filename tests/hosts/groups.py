"""Groups of two real processes for tests, on loopback or in network namespaces."""

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fairkv_jax.command_line import as_flag
from tests.engine.drive import tiny_cache_bytes
from tests.engine.logged import MAX_TOKENS, NUM_PAGES, NUM_ROWS
from tests.serve.live import Process, eventually, own_devices

HOST_TIMEOUT_S = 5.0
BOUND_S = HOST_TIMEOUT_S + 5.0
"""The time after a failure within which all processes must have ended."""
PATIENCE_S = 240.0
ENGINE: dict[str, Any] = {
    "tensor_parallel_size": 2,
    "kv_policy": "ada_snapkv",
    "kv_budget": 40,
    "kv_window": 8,
    "max_model_len": MAX_TOKENS,
    "max_num_seqs": NUM_ROWS,
    "prefill_chunk_size": 32,
    "kv_cache_memory_bytes": 2 * tiny_cache_bytes(NUM_PAGES[2], NUM_ROWS, MAX_TOKENS),
}
"""What `logged_engine` is made of, as options."""


@dataclass(frozen=True)
class Network:
    """Where the processes run, and how they reach each other."""

    leader_address: str = "127.0.0.1"
    wrappers: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    """Commands that run the leader's and the follower's command, see `Process`."""


LOOPBACK = Network()


@dataclass
class Group:
    """A leader and a follower."""

    leader: Process
    follower: Process
    results: dict[str, Any] = field(default_factory=dict)

    def wait_for(self, name: str, patience_s: float = PATIENCE_S) -> Any:
        """Waits for the leader's result of a scenario, and returns it."""
        eventually(lambda: name in self._results() or self.leader.ended, patience_s)
        assert name in self._results(), self.logs
        return self._results()[name]

    def wait_stepping(self) -> None:
        """Waits until the leader steps, or has stepped."""
        self.wait_for("stepping")

    def statuses(self, began: float) -> tuple[int, int]:
        """The exit statuses of leader and follower; both must end within the protocol's bound.

        Args:
            began: when the failure happened, on the monotonic clock.
        """
        left = began + BOUND_S - time.monotonic()
        eventually(lambda: self.leader.ended and self.follower.ended, left)
        return self.leader.status(), self.follower.status()

    @property
    def logs(self) -> str:
        return f"leader:\n{self.leader.log}\nfollower:\n{self.follower.log}"

    def _results(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for line in list(self.leader.lines):
            if line.startswith("{"):
                found |= json.loads(line)
        return found


@contextmanager
def scenario_group(
    checkpoint: Path,
    folder: Path,
    scenarios: Sequence[str],
    *,
    network: Network = LOOPBACK,
    step_timeout_s: int = 60,
    follower_module: str = "fairkv_jax.serve",
    follower_options: dict[str, Any] | None = None,
    **engine: Any,
) -> Iterator[Group]:
    """A leader that runs scenarios, and a follower as users start it."""
    coordinator = f"{network.leader_address}:{free_port()}"
    options = ENGINE | engine
    hosts = {"num_hosts": 2, "host_timeout": HOST_TIMEOUT_S, "coordinator": coordinator}
    settings = {
        "hosts": {"host_index": 0, **hosts},
        "step_timeout": step_timeout_s,
        "checkpoint": str(checkpoint),
        "log": str(folder / "schedule.jsonl"),
        "engine": options,
        "scenarios": list(scenarios),
    }
    of_follower = {
        "model": checkpoint,
        "host_index": 1,
        "stall_timeout": step_timeout_s,
        **hosts,
        **options,
        **(follower_options or {}),
    }
    leader_wrapper, follower_wrapper = network.wrappers
    with (
        Process(
            "tests.hosts.lead", [json.dumps(settings)], wrapper=leader_wrapper, **own_devices()
        ) as leader,
        Process(
            follower_module, as_flags(of_follower), wrapper=follower_wrapper, **own_devices()
        ) as follower,
    ):
        yield Group(leader, follower)


@contextmanager
def served_group(
    checkpoint: Path, *, network: Network = LOOPBACK, **options: Any
) -> Iterator[Group]:
    """A server over two hosts; it may not be ready yet."""
    hosts = {
        "model": checkpoint,
        "num_hosts": 2,
        "host_timeout": HOST_TIMEOUT_S,
        "coordinator": f"{network.leader_address}:{free_port()}",
        **ENGINE,
        "max_num_seqs": 1,
        **options,
    }
    leader_wrapper, follower_wrapper = network.wrappers
    listen = {"host": network.leader_address, "port": free_port()}
    flags = as_flags({**hosts, "host_index": 0, **listen})
    with (
        Process("fairkv_jax.serve", flags, wrapper=leader_wrapper, **own_devices()) as leader,
        Process(
            "fairkv_jax.serve",
            as_flags({**hosts, "host_index": 1}),
            wrapper=follower_wrapper,
            **own_devices(),
        ) as follower,
    ):
        yield Group(leader, follower)


@contextmanager
def namespaces() -> Iterator[Network]:
    """Two network namespaces that a pair of virtual interfaces joins.

    Raises:
        PermissionError: they are not permitted here; the message says why.
    """
    names = [f"fairkv-{os.getpid()}-{end}" for end in "ab"]
    made = []
    try:
        for name in names:
            _ip("netns", "add", name)
            made.append(name)
        ends = [f"fkv{os.getpid() % 100000}{end}" for end in "ab"]
        _ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for number, (name, end) in enumerate(zip(names, ends, strict=True), 1):
            _ip("link", "set", end, "netns", name, "name", "eth0")
            _ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", name, "link", "set", device, "up")
        wrappers = [("ip", "netns", "exec", name) for name in names]
        yield Network("10.77.0.1", (wrappers[0], wrappers[1]))
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=False)


def take_down(network: Network) -> None:
    """Cuts the link between the namespaces."""
    _ip("-n", network.wrappers[1][-1], "link", "set", "eth0", "down")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def as_flags(options: dict[str, Any]) -> list[str]:
    return [f"{as_flag(name)}={value}" for name, value in options.items()]


def _ip(*arguments: str) -> None:
    """Runs `ip`."""
    try:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise PermissionError("there is no command `ip`") from error
    except subprocess.CalledProcessError as error:
        raise PermissionError(f"`ip {' '.join(arguments)}`: {error.stderr.strip()}") from error
