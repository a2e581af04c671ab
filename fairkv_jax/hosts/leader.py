"""The leader: sends what the devices of all hosts execute, and watches over the group."""

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NoReturn

from fairkv_jax.command_line import ABORTED, exit_now
from fairkv_jax.engine.build import device_memory_bytes
from fairkv_jax.hosts.handshake import connect_leader
from fairkv_jax.hosts.jax_runtime import Coordinator
from fairkv_jax.hosts.messages import Failed, Heartbeat, Joined, Refused, Stop, Stopped
from fairkv_jax.hosts.options import HostOptions
from fairkv_jax.hosts.transport import LeaderSockets
from fairkv_jax.hosts.watch import POLL_S, Heart, StepTimer

log = logging.getLogger(__name__)

EXIT_GRACE_S = 4.0
"""Maximum time from a failure to the exit, in which clients receive their errors."""
_REASONS = {0: "the leader has finished", ABORTED: "the leader was told to end at once"}
"""Why followers end, by the leader's exit status."""
_LEAVING_S = 2.0
"""Maximum time to wait for followers that have been told to stop."""


class GroupFailed(RuntimeError):
    """A host has failed or fallen silent, and the group ends."""


class Leader:
    """The leader's view of the group. The engine's thread joins, sends and waits."""

    def __init__(self, options: HostOptions, step_timeout_s: float):
        """`step_timeout_s` is the longest time that a step may take."""
        self._options, self._steps = options, StepTimer(step_timeout_s)
        self._sockets: LeaderSockets | None = None
        self._heard: dict[int, float] = {}
        """When each follower was heard last."""
        self._received: dict[type, dict[int, Any]] = defaultdict(dict)
        """By the class of the message and the index of the host."""
        self._condition = threading.Condition()
        self._failure: str | None = None
        self._on_failure: Callable[[BaseException], None] = lambda error: None
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
            raise GroupFailed(
                f"not all followers have connected to {', '.join(sockets.endpoints)} within "
                f"{self._options.host_timeout:g} seconds (--host-timeout): check that they can "
                "reach the leader at all of its ports"
            )
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

    def step(self) -> AbstractContextManager[None]:
        """The group fails if the body takes longer than a step may."""
        return self._steps.step()

    def call_on_failure(self, on_failure: Callable[[BaseException], None]) -> None:
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
            self._sockets.send(Stop(True, reason))
        self._on_failure(GroupFailed(reason))
        # The engine's thread may never return from a collective with a host that is gone.
        last_resort = threading.Timer(EXIT_GRACE_S, exit_now, (1,))
        last_resort.daemon = True
        last_resort.start()

    def end(self, status: int) -> NoReturn:
        """Tells the followers to end, and exits without JAX's barrier, which needs all hosts."""
        reason = self._failure or _REASONS.get(status, "the leader has failed")
        self._is_ending = True
        if self._sockets is not None:
            self._sockets.send(Stop(status != 0, reason))
            with self._condition:
                self._condition.wait_for(self._all_have_left, _LEAVING_S)
        exit_now(status)

    def _all_have_left(self) -> bool:
        return self._failure is not None or len(self._received[Stopped]) == len(self._heard)

    def _check(self) -> None:
        if self._failure is not None:
            raise GroupFailed(self._failure)

    def _watch(self) -> None:
        """Receives messages, sends heartbeats, and notices silence; runs in its own thread."""
        assert self._sockets is not None
        heart = Heart(self._options.host_timeout)
        try:
            while True:
                for host, message in self._sockets.receive(POLL_S):
                    self._heard[host] = time.monotonic()
                    self._handle(host, message)
                now = time.monotonic()
                if heart.is_due(now):
                    self._sockets.send(Heartbeat())
                self._check_silence(now)
                self._steps.check(now)
        except Exception as error:
            self._lose(str(error))

    def _handle(self, host: int, message: Any) -> None:
        if isinstance(message, Failed):
            self._lose(f"host {host} has failed: {message.reason}")
        elif isinstance(message, Refused):
            self._lose(message.reason)
        elif not isinstance(message, Heartbeat):
            with self._condition:
                self._received[type(message)][host] = message
                self._condition.notify_all()

    def _check_silence(self, now: float) -> None:
        timeout = self._options.host_timeout
        for host, heard in self._heard.items():
            if now - heard > timeout and host not in self._received[Stopped]:
                self._lose(f"host {host} has been silent for {timeout:g} seconds (--host-timeout)")

    def _lose(self, reason: str) -> None:
        if self._failure is None and not self._is_ending:
            log.error("the group of hosts ends: %s", reason)
            self.fail(reason)
