"""The options of several hosts: flags, LeaderWorkerSet's and Slurm's environment."""

import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest

from fairkv_jax.engine.build import prepare
from fairkv_jax.engine.schedule_log import fingerprint
from fairkv_jax.hosts.handshake import _check_versions, disagreement
from fairkv_jax.hosts.jax_runtime import Coordinator
from fairkv_jax.hosts.messages import Start
from fairkv_jax.hosts.options import HostOptions, split_address
from fairkv_jax.serve.flags import parse

LWS = {"LWS_GROUP_SIZE": "4", "LWS_WORKER_INDEX": "2", "LWS_LEADER_ADDRESS": "leader.svc"}
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[01-02]",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
TWO = ["--num-hosts=2", "--host-index=1", "--coordinator=10.0.0.1:99"]


@pytest.mark.parametrize(
    ("flags", "environ", "expected"),
    [
        ([], {}, HostOptions()),
        (TWO, {}, HostOptions(2, 1, "10.0.0.1:99")),
        ([], LWS, HostOptions(4, 2, "leader.svc")),
        (["--coordinator=other:5"], LWS, HostOptions(4, 2, "other:5")),
        (["--num-hosts=1"], LWS, HostOptions(1, 0, "leader.svc")),
        (TWO, LWS, HostOptions(2, 1, "10.0.0.1:99")),
        ([], SLURM, HostOptions(2, 1, None)),
        (["--num-hosts=1"], SLURM, HostOptions()),
        # The shell of `salloc -n 4`, and a batch script outside of a step.
        ([], {**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, HostOptions()),
        ([], {name: SLURM[name] for name in ("SLURM_JOB_ID", "SLURM_NTASKS")}, HostOptions()),
        ([], {**SLURM, **LWS}, HostOptions(4, 2, "leader.svc")),
    ],
)
def test_where_they_come_from(flags: list[str], environ: dict[str, str], expected: HostOptions):
    assert parse(flags, environ).hosts == expected


@pytest.mark.parametrize(
    ("flags", "environ", "error"),
    [
        (["--num-hosts=2"], {}, "needs the address of host 0"),
        (["--num-hosts=0"], {}, "--num-hosts must be at least 1"),
        (["--host-index=1"], {}, "--host-index must be between 0 and 0"),
        ([*TWO, "--host-timeout=0.5"], {}, "--host-timeout must be between 1 and 3600 seconds"),
        ([*TWO, "--host-timeout=inf"], {}, "--host-timeout must be between 1 and 3600 seconds"),
        ([*TWO[:2], "--coordinator=[::1"], {}, "brackets around an IPv6 address"),
        ([*TWO[:2], "--coordinator=fd00::2"], {}, "brackets around an IPv6 address"),
        ([*TWO[:2], "--coordinator=a:b"], {}, "--coordinator must be HOST:PORT, got 'a:b'"),
        ([], {**LWS, "LWS_GROUP_SIZE": "x"}, r"\$LWS_GROUP_SIZE must be a number, got 'x'"),
    ],
)
def test_faults_are_named(flags: list[str], environ: dict[str, str], error: str):
    with pytest.raises(SystemExit, match=error):
        parse(flags, environ)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("a", ("a", 8476)),
        ("a:1", ("a", 1)),
        ("[::1]:2", ("::1", 2)),
        ("[::1]", ("::1", 8476)),
    ],
)
def test_addresses(address: str, expected: Any):
    assert split_address(address) == expected


@pytest.mark.parametrize("host", ["127.0.0.1", "192.0.2.1"])
def test_a_leader_that_cannot_listen_says_so(host: str):
    """On a port that is taken, or at another machine's address: JAX would crash."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"host 0 cannot listen on {host} port {port}"):
            Coordinator(HostOptions(2, 0, f"{host}:{port}"))


def test_a_leader_whose_name_is_unknown_says_so():
    with pytest.raises(ValueError, match=r"the coordinator's name 'leader\.invalid' cannot be"):
        Coordinator(HostOptions(2, 0, "leader.invalid"))


def test_the_hosts_divide_the_virtual_devices():
    assert parse([]).cpu_devices == 2
    assert parse(TWO).cpu_devices == 1
    assert parse([*TWO, "--tensor-parallel-size=8"]).cpu_devices == 4


def test_versions_must_be_the_same():
    with pytest.raises(ValueError, match=r"host 1 has jax 0\.10\.2, but the leader has 0\.12\.0"):
        _check_versions(1, {"jax": "0.10.2", "numpy": "2"}, {"jax": "0.12.0", "numpy": "2"})


@pytest.mark.parametrize(
    ("leaders", "sentence"),
    [
        ({}, None),
        ({"fingerprint": "abc"}, "but the leader has 'abc': give all hosts the same model"),
        ({"device_kind": "H100"}, "but the leader has 'H100': use the same on all hosts"),
        ({"kv_config": {"window": 5}}, "but the leader has 5: start all hosts with the same"),
        ({"engine_config": {"page_size": 48}}, "but the leader has 48: start all hosts with"),
        ({"engine_config": {"max_num_seqs": 5}}, None),
    ],
)
def test_what_must_be_the_same(
    tiny_checkpoint: Path, leaders: dict[str, Any], sentence: str | None
):
    """The leader chooses what depends on all hosts, such as the size of the batch."""
    ready = prepare(tiny_checkpoint, {})
    start = Start(
        ready.engine_config,
        ready.kv_config,
        plan="",
        pages_per_device=1,
        device_kind=jax.local_devices()[0].device_kind,
        fingerprint=fingerprint(ready.checkpoint),
        eos_token_ids=(),
        instruction=None,
    )
    for name, value in leaders.items():
        if isinstance(value, dict):
            value = replace(getattr(start, name), **value)
        start = replace(start, **{name: value})
    found = disagreement(start, ready, 1)
    assert (found is None) == (sentence is None)
    assert sentence is None or sentence in str(found)


def test_a_single_process_imports_nothing_for_it():
    code = (
        "import sys, fairkv_jax.serve.__main__, fairkv_jax.serve.server, fairkv_jax.engine.build\n"
        "print(*[name for name in sys.modules if name.startswith(('zmq', 'fairkv_jax.hosts.'))])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "fairkv_jax.hosts.options"
