"""JAX over several processes; everything here that is not in JAX's public interface.

JAX's coordinator gives all processes their devices, and keeps a few keys and values for them. Its
own handling of lost followers is turned off: it would end the leader before clients are told. A
follower that loses the coordinator, which is in the leader's process, is aborted by JAX, unless the
leader has told it to stop before.
"""

import logging
import socket
import time
from typing import Any

import jax
from jax._src import clusters, distributed, xla_bridge
from jaxlib import _jax  # pyright: ignore[reportAttributeAccessIssue]

from fairkv_jax.hosts.options import HostOptions, split_address

log = logging.getLogger(__name__)

_RESOLVING_S = 5.0
"""Seconds between attempts to resolve a name."""
_MAX_WAIT_S = 24 * 3600
"""Seconds without a heartbeat after which JAX would act; our own heartbeats are far quicker."""
_JOINING_S = 600
"""Seconds that the hosts have to find each other."""


class Coordinator:
    """The coordinator as one process of the group sees it."""

    def __init__(self, options: HostOptions):
        """Joins the group, and waits until all hosts have; must precede any use of devices.

        Raises:
            ValueError: the coordinator's name is unknown, or the leader cannot listen there.
            RuntimeError: the hosts do not find each other in time.
        """
        address = options.coordinator or clusters.SlurmCluster.get_coordinator_address(None, None)
        host, port = split_address(address)
        self.host = _resolved(host, patience_s=0 if options.is_leader else _JOINING_S)
        """The coordinator's IP address."""
        if options.is_leader:
            _check_free(self.host, port)
        at = f"[{self.host}]:{port}" if ":" in self.host else f"{self.host}:{port}"
        jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM
        jax.config.update("jax_enable_recoverability", True)  # a lost host would abort the others
        # On CPUs, two programs that run side by side could confuse each other's collectives.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        jax.distributed.initialize(
            at,
            options.num_hosts,
            options.host_index,
            cluster_detection_method="deactivate",
            initialization_timeout=_JOINING_S,
            heartbeat_timeout_seconds=_MAX_WAIT_S,
            coordinator_bind_address=at,
        )
        self._client: Any = distributed.global_state.client
        xla_bridge.register_backend_factory("cpu", self._cpu_client, priority=0, fail_quietly=False)

    def put(self, key: str, value: str) -> None:
        """Tells all hosts a value; a key can be written once."""
        self._client.key_value_set(key, value)

    def get(self, key: str) -> str:
        """Waits for a value and returns it.

        Raises:
            RuntimeError: nobody writes it.
        """
        return self._client.blocking_key_value_get(key, _JOINING_S * 1000)

    def _cpu_client(self) -> Any:
        """Makes the client of CPU devices, whose collectives use the route to the coordinator.

        By default they use the address to which this machine's name resolves, which other hosts
        often cannot reach.
        """
        collectives = _jax.make_gloo_tcp_collectives(
            distributed_client=self._client, hostname=own_address(self.host)
        )
        return xla_bridge.make_cpu_client(collectives)


def own_address(host: str) -> str:
    """Returns the IP address of this machine that packets to `host`, an IP address, carry."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing
        return probe.getsockname()[0]


def _check_free(host: str, port: int) -> None:
    """Raises ValueError if this process cannot listen there: JAX would crash, or share the port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"host 0 cannot listen on {host} port {port} ({error.strerror}): give a free port "
                "of this machine as --coordinator, and the other hosts a --host-index of their own"
            ) from error


def _resolved(host: str, patience_s: float) -> str:
    """Returns the IP address of a name, which other hosts may be given a little later than this."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
        except OSError as error:
            if time.monotonic() >= deadline:
                raise ValueError(
                    f"the coordinator's name {host!r} cannot be resolved ({error}): give the "
                    "address of host 0 as --coordinator"
                ) from error
        log.info("waiting until the coordinator's name %r can be resolved", host)
        time.sleep(_RESOLVING_S)
