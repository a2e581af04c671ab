"""Whatever fails, the whole group ends: clients get errors, and no process remains."""

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.hosts.groups import (
    HOST_TIMEOUT_S,
    LOOPBACK,
    PATIENCE_S,
    Network,
    scenario_group,
    served_group,
    take_down,
)
from tests.hosts.test_identity import check
from tests.oracle.tiny import write_tiny_checkpoint
from tests.serve.live import Process, eventually

pytestmark = pytest.mark.long

ENDED = (1, -signal.SIGABRT)
"""Statuses of a follower whose leader is gone: JAX may abort it before it notices the silence."""


@contextmanager
def asking(url: str, count: int, network: Network = LOOPBACK) -> Iterator[Process]:
    """Clients with that many requests, the first of which is being answered."""
    arguments = [url, str(count)]
    with Process("tests.hosts.ask", arguments, wrapper=network.wrappers[0]) as clients:
        eventually(lambda: "first" in clients.log or clients.ended, PATIENCE_S)
        yield clients


def answers(clients: Process) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in clients.lines if line.startswith("{")]
    return [line for line in lines if "first" not in line]


def test_a_follower_that_is_killed_in_a_step(tiny_checkpoint: Path):
    with served_group(tiny_checkpoint) as group:
        url = group.leader.wait_ready(PATIENCE_S)
        with asking(url, 40) as clients:
            group.follower.send(signal.SIGKILL)
            began = time.monotonic()
            assert group.statuses(began) == (1, -signal.SIGKILL), group.logs
            assert clients.status() == 0
            *ends, health = answers(clients)
            failed = [each for each in ends if each.get("last") != "[DONE]"]
            assert failed, "all answers were complete before"
            for each in failed:
                assert each.get("status") == 503 or "the engine has failed" in each["last"], each
            assert health == {"health": 503}


@pytest.mark.parametrize("scenario", ["idle", "endless"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_follower_that_falls_silent(
    tiny_checkpoint: Path, tmp_path: Path, scenario: str, number: signal.Signals
):
    with scenario_group(tiny_checkpoint, tmp_path, [scenario]) as group:
        group.wait_stepping()
        group.follower.send(number)
        began = time.monotonic()
        eventually(lambda: group.leader.ended, HOST_TIMEOUT_S + 5)
        assert group.leader.status() == 1
        if number == signal.SIGSTOP:
            assert "host 1 has been silent for 5 seconds" in group.leader.log
            group.follower.send(signal.SIGCONT)
            _, status = group.statuses(time.monotonic())
            assert status in ENDED, group.logs
        assert time.monotonic() - began < 2 * (HOST_TIMEOUT_S + 5)


def test_a_leader_that_is_killed(tiny_checkpoint: Path, tmp_path: Path):
    with scenario_group(tiny_checkpoint, tmp_path, ["endless"]) as group:
        group.wait_stepping()
        group.leader.send(signal.SIGKILL)
        _, status = group.statuses(time.monotonic())
        assert status in ENDED, group.logs


def test_a_link_that_goes_down(tiny_checkpoint: Path, tmp_path: Path, network: Network):
    with scenario_group(tiny_checkpoint, tmp_path, ["endless"], network=network) as group:
        group.wait_stepping()
        take_down(network)
        assert group.statuses(time.monotonic()) == (1, 1), group.logs
        assert "host 1 has been silent" in group.leader.log
        assert "the leader has been silent" in group.follower.log


def test_sigterm_is_for_the_leader(tiny_checkpoint: Path):
    with served_group(tiny_checkpoint) as group:
        url = group.leader.wait_ready(PATIENCE_S)
        group.follower.send(signal.SIGTERM)
        with asking(url, 2) as clients:
            group.leader.send(signal.SIGTERM)
            assert (group.leader.status(), group.follower.status()) == (0, 0), group.logs
            clients.status()
            ends = [each["last"] for each in answers(clients) if "last" in each]
            assert ends == ["[DONE]", "[DONE]"]
            assert "the leader has finished" in group.follower.log


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("stuck", "a step has taken 3 seconds"),
        ("raises", "a fault for the test"),
        ("differs", "host 1 has sampled other tokens than the leader"),
    ],
)
def test_a_follower_with_a_fault(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, why: str
):
    monkeypatch.setenv("FAULT", fault)
    with scenario_group(
        tiny_checkpoint,
        tmp_path,
        ["endless"],
        step_timeout_s=3 if fault == "stuck" else 60,
        follower_module="tests.hosts.faulty",
    ) as group:
        eventually(lambda: why in group.follower.log or group.follower.ended, PATIENCE_S)
        assert group.statuses(time.monotonic()) == (1, 1), group.logs
        assert why in group.follower.log
        assert why in group.leader.log


def test_clocks_that_differ(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FAULT", "skewed")
    check(tiny_checkpoint, tmp_path, ("short",), follower_module="tests.hosts.faulty")


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("kv_budget", "host 1 has kv_budget 48, but the leader has 40: start all hosts with"),
        ("model", "host 1 has a checkpoint of fingerprint '"),
    ],
)
def test_hosts_that_do_not_match(tiny_checkpoint: Path, tmp_path: Path, what: str, sentence: str):
    other = write_tiny_checkpoint(tmp_path / "other.gguf", seed=1)
    options = {"kv_budget": 48} if what == "kv_budget" else {"model": other}
    with scenario_group(tiny_checkpoint, tmp_path, ["short"], follower_options=options) as group:
        eventually(lambda: sentence in group.follower.log or group.follower.ended, PATIENCE_S)
        assert group.statuses(time.monotonic()) == (1, 1), group.logs
        assert sentence in group.follower.log
        assert sentence in group.leader.log


@pytest.mark.parametrize("who", ["leader", "follower"])
def test_a_host_without_a_model(tiny_checkpoint: Path, tmp_path: Path, who: str):
    models = tiny_checkpoint, Path("nowhere.gguf")
    of_leader, of_follower = models if who == "follower" else models[::-1]
    options = {"model": of_follower}
    with scenario_group(of_leader, tmp_path, ["short"], follower_options=options) as group:
        why = "no checkpoint at nowhere.gguf"
        eventually(lambda: why in group.follower.log or group.follower.ended, PATIENCE_S)
        assert group.statuses(time.monotonic()) == (1, 1), group.logs
        assert why in group.follower.log
        assert why in group.leader.log
