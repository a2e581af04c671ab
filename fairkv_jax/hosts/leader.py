"""The leader: sends what the devices of all hosts execute, and watches over the group."""

import logging
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from fairkv_jax.engine.build import device_memory_bytes
from fairkv_jax.hosts.handshake import connect_leader
from fairkv_jax.hosts.jax_runtime import Coordinator
from fairkv_jax.hosts.messages import Beat, Failed, Joined, Left, Refused, Stop
from fairkv_jax.hosts.options import HostOptions
from fairkv_jax.hosts.transport import LeaderSockets

log = logging.getLogger(__name__)

POLL_S = 0.2
BEATS_PER_TIMEOUT = 5
EXIT_GRACE_S = 4.0
"""Maximum time from a failure to the exit, in which clients receive their errors."""
_LEAVING_S = 2.0
"""Maximum time to wait for followers that have been told to stop."""


class GroupFailed(RuntimeError):
    """A host has failed or fallen silent, and the group ends."""


class Leader:
    """The leader's view of the group. The engine's thread joins, sends and waits."""

    def __init__(self, options: HostOptions, step_timeout_s: float):
        """`step_timeout_s` is the longest time that a step may take."""
        self._options, self._step_timeout_s = options, step_timeout_s
        self._sockets: LeaderSockets | None = None
        self._heard: dict[int, float] = {}
        """When each follower was heard last."""
        self._received: dict[type, dict[int, Any]] = defaultdict(dict)
        """By the class of the message and the index of the host."""
        self._condition = threading.Condition()
        self._failure: str | None = None
        self._on_failure: Callable[[BaseException], None] = lambda error: None
        self._step_began: float | None = None
        self._is_ending = False

    def join(self) -> None:
        """Waits until all hosts are connected; must precede any use of devices.

        Raises:
            ValueError: the coordinator's address is not this machine's, or hosts do not match.
            RuntimeError: the hosts do not find each other in time.
        """
        log.info("waiting for %d hosts", self._options.num_hosts)
        sockets = connect_leader(Coordinator(self._options), self._options.num_hosts)
        if not sockets.wait_for_followers(self._options.host_timeout):
            raise GroupFailed("not all hosts have connected to the leader in time")
        now = time.monotonic()
        self._heard = dict.fromkeys(range(1, self._options.num_hosts), now)
        self._sockets = sockets
        threading.Thread(target=self._watch, name="hosts", daemon=True).start()

    def least_memory_bytes(self) -> int | None:
        """Returns what XLA may take of the smallest device of all hosts; None if unknown.

        Raises:
            GroupFailed: the group has failed.
        """
        own = device_memory_bytes()  # the followers wait until this process knows its devices
        sizes = [own, *(each.memory_bytes for each in self.wait_for(Joined).values())]
        return min((size for size in sizes if size is not None), default=None)

    def send(self, message: Any) -> None:
        """Sends a message to all followers.

        Raises:
            GroupFailed: the group has failed.
        """
        self._check()
        assert self._sockets is not None
        self._sockets.send(message)

    def wait_for(self, kind: type) -> dict[int, Any]:
        """Waits for a message of this class from every follower, and returns them by host.

        Raises:
            GroupFailed: the group has failed.
        """
        with self._condition:
            while len(self._received[kind]) < self._options.num_hosts - 1:
                self._check()
                self._condition.wait()
            return self._received.pop(kind)

    @contextmanager
    def step(self) -> Iterator[None]:
        """The group fails if the body takes longer than a step may."""
        self._step_began = time.monotonic()
        try:
            yield
        finally:
            self._step_began = None

    def report_failure(self, on_failure: Callable[[BaseException], None]) -> None:
        """Has `on_failure` called, in another thread, when the group fails."""
        self._on_failure = on_failure

    def fail(self, reason: str) -> None:
        """Ends the group: followers at once, this process when clients have their errors."""
        with self._condition:
            if self._failure is not None or self._is_ending:
                return
            self._failure = reason
            self._condition.notify_all()
        if self._sockets is not None:
            self._sockets.send(Stop(1, reason))
        self._on_failure(GroupFailed(reason))
        # The engine's thread may never return from a collective with a host that is gone.
        last_resort = threading.Timer(EXIT_GRACE_S, exit_now, (1,))
        last_resort.daemon = True
        last_resort.start()

    def end(self, status: int) -> NoReturn:
        """Tells the followers to end, and exits without JAX's barrier, which needs all hosts."""
        reason = self._failure or ("the leader ends" if status == 0 else "the leader has failed")
        self._is_ending = True
        if self._sockets is not None:
            self._sockets.send(Stop(status, reason))
            with self._condition:
                self._condition.wait_for(self._all_have_left, _LEAVING_S)
        exit_now(status)

    def _all_have_left(self) -> bool:
        return self._failure is not None or len(self._received[Left]) == len(self._heard)

    def _check(self) -> None:
        if self._failure is not None:
            raise GroupFailed(self._failure)

    def _watch(self) -> None:
        """Receives messages, sends heartbeats, and notices silence; runs in its own thread."""
        assert self._sockets is not None
        next_beat = 0.0
        try:
            while True:
                for host, message in self._sockets.receive(POLL_S):
                    self._heard[host] = time.monotonic()
                    self._handle(host, message)
                now = time.monotonic()
                if now >= next_beat:
                    self._sockets.send(Beat())
                    next_beat = now + self._options.host_timeout / BEATS_PER_TIMEOUT
                self._check_times(now)
        except Exception as error:
            self._lose(str(error))

    def _handle(self, host: int, message: Any) -> None:
        if isinstance(message, Failed):
            self._lose(f"host {host} has failed: {message.reason}")
        elif isinstance(message, Refused):
            self._lose(message.reason)
        elif not isinstance(message, Beat):
            with self._condition:
                self._received[type(message)][host] = message
                self._condition.notify_all()

    def _check_times(self, now: float) -> None:
        timeout = self._options.host_timeout
        for host, heard in self._heard.items():
            if now - heard > timeout and host not in self._received[Left]:
                self._lose(f"host {host} has been silent for {timeout:g} seconds (--host-timeout)")
        began = self._step_began
        if began is not None and now - began > self._step_timeout_s:
            self._lose(f"a step has taken {self._step_timeout_s:g} seconds (--stall-timeout)")

    def _lose(self, reason: str) -> None:
        if self._failure is None and not self._is_ending:
            log.error("the group of hosts ends: %s", reason)
            self.fail(reason)


def exit_now(status: int) -> NoReturn:
    """Exits without waiting for other threads or for JAX."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
