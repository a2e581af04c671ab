"""How the hosts find each other, and what they must have in common."""

import json
import reprlib
from dataclasses import fields, replace
from importlib.metadata import version
from typing import Any

import jax

from fairkv_jax import __version__
from fairkv_jax.engine.build import Preparation
from fairkv_jax.engine.schedule_log import fingerprint
from fairkv_jax.hosts.jax_runtime import Coordinator
from fairkv_jax.hosts.messages import Start
from fairkv_jax.hosts.transport import FollowerSockets, Keys, LeaderSockets

_LEADER = "fairkv/leader"
_CHOSEN_BY_LEADER = ("kv_cache_bytes", "max_num_seqs")
"""Fields of the engine's configuration that depend on all hosts, unless they are given."""


def connect_leader(coordinator: Coordinator, num_hosts: int) -> LeaderSockets:
    """Waits for the followers' keys, and opens sockets that accept them.

    Raises:
        ValueError: a follower has other versions; or see `LeaderSockets`.
    """
    keys, followers = Keys(), {}
    greetings = [json.loads(coordinator.get(_key(host))) for host in range(1, num_hosts)]
    for host, greeting in enumerate(greetings, 1):
        followers[greeting["key"]] = host
    sockets = LeaderSockets(coordinator.host, keys, followers)
    own = {"key": keys.public, "versions": _versions(), "endpoints": sockets.endpoints}
    coordinator.put(_LEADER, json.dumps(own))
    for host, greeting in enumerate(greetings, 1):
        _check_versions(host, greeting["versions"], own["versions"])
    return sockets


def connect_follower(coordinator: Coordinator, host_index: int) -> FollowerSockets:
    """Hands the own key to the leader, and connects to its sockets.

    Raises:
        ValueError: the leader has other versions.
    """
    keys, own = Keys(), _versions()
    coordinator.put(_key(host_index), json.dumps({"key": keys.public, "versions": own}))
    leader = json.loads(coordinator.get(_LEADER))
    _check_versions(host_index, own, leader["versions"])
    return FollowerSockets(leader["endpoints"], keys, leader["key"])


def disagreement(start: Start, ready: Preparation, host_index: int) -> str | None:
    """Returns the sentence that says in what a follower differs from its leader; None: nothing."""

    def differ(what: str, mine: Any, leaders: Any, remedy: str) -> str:
        return (
            f"host {host_index} has {what} {reprlib.repr(mine)}, but the leader has "
            f"{reprlib.repr(leaders)}: {remedy}"
        )

    found = fingerprint(ready.checkpoint)
    if found != start.fingerprint:
        remedy = "give all hosts the same model"
        return differ("a checkpoint of fingerprint", found[:12], start.fingerprint[:12], remedy)
    kind = jax.local_devices()[0].device_kind
    if kind != start.device_kind:
        return differ("devices of the kind", kind, start.device_kind, "use the same on all hosts")
    chosen = [name for name in _CHOSEN_BY_LEADER if name not in ready.given]
    engine_config = replace(
        ready.engine_config, **{name: getattr(start.engine_config, name) for name in chosen}
    )
    remedy = "start all hosts with the same options"
    for mine, leaders in ((engine_config, start.engine_config), (ready.kv_config, start.kv_config)):
        for each in fields(mine):
            ours, theirs = getattr(mine, each.name), getattr(leaders, each.name)
            if ours != theirs:
                return differ(_option_name(each), ours, theirs, remedy)
    return None


def _option_name(field: Any) -> str:
    return field.metadata.get("option", {}).get("name") or field.name


def _key(host: int) -> str:
    return f"fairkv/host/{host}"


def _versions() -> dict[str, str]:
    names = ("jax", "jaxlib", "numpy", "ml_dtypes")
    return {"fairkv_jax": __version__, **{name: version(name) for name in names}}


def _check_versions(host: int, own: dict[str, str], leaders: dict[str, str]) -> None:
    for name in sorted({*own, *leaders}):
        if own.get(name) != leaders.get(name):
            raise ValueError(
                f"host {host} has {name} {own.get(name)}, but the leader has {leaders.get(name)}: "
                "install the same versions on all hosts"
            )
