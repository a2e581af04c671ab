"""launch/slurm/serve.sbatch under a Slurm of one node, with GPUs that are only declared."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest

from tests.launch.routers import free_port
from tests.serve.live import PATIENCE_S, ROOT, eventually, own_devices

pytestmark = pytest.mark.long

BATCH_FILE = ROOT / "launch" / "slurm" / "serve.sbatch"
START_S = 400.0
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol")
SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/none
CredType=cred/none
CryptoType=crypto/none
SlurmctldPort={controller_port}
SlurmdPort={node_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=1000 Gres=gpu:4 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """A controller and a node on this machine."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {
            **os.environ,
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
            "SLURM_CONF": str(folder / "slurm.conf"),
        }
        host = socket.gethostname().partition(".")[0]
        for name in ("state", "spool"):
            (folder / name).mkdir()
        ports = {"controller_port": free_port(), "node_port": free_port()}
        conf = SLURM_CONF.format(host=host, folder=folder, **ports)
        (folder / "slurm.conf").write_text(conf, encoding="utf-8")
        for gpu in range(4):
            (folder / f"gpu{gpu}").touch()
        gres = f"NodeName={host} Name=gpu File={folder}/gpu[0-3]\n"
        (folder / "gres.conf").write_text(gres, encoding="utf-8")

    def start(self, daemon: str) -> subprocess.Popen:
        with (self.folder / f"{daemon}.log").open("wb") as log:
            return subprocess.Popen(
                [daemon, "-D"], stdout=log, stderr=log, env=self.environment, cwd=self.folder
            )

    def run(self, *command: str, **environment: str) -> str:
        done = subprocess.run(
            command,
            env={**self.environment, **environment},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    def submit(self, arguments: Sequence[str], *, options: Sequence[str] = ()) -> str:
        """Submits the batch file with the server's arguments; returns the job's number."""
        log = f"--output={self.folder}/job-%j.log"
        environment = {**own_devices(), "PYTHON": sys.executable}
        said = self.run("sbatch", log, *options, str(BATCH_FILE), *arguments, **environment)
        return said.split()[-1]

    def log(self, job: str) -> str:
        file = self.folder / f"job-{job}.log"
        return file.read_text(encoding="utf-8") if file.exists() else ""

    def state(self, job: str) -> str:
        found = re.search(r"JobState=(\S+)", self.run("scontrol", "show", "job", job))
        assert found is not None
        return found[1]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    if missing := [name for name in PROGRAMS if shutil.which(name, path=path) is None]:
        pytest.skip(f"{', '.join(missing)} not installed (apt-get install slurmctld slurmd)")
    if os.geteuid() != 0:
        pytest.skip("slurmd runs only as root")
    slurm = Slurm(tmp_path_factory.mktemp("slurm"))
    with ExitStack() as running:
        for daemon in ("slurmctld", "slurmd"):
            process = slurm.start(daemon)
            running.callback(process.wait, PATIENCE_S)
            running.callback(process.terminate)
        eventually(lambda: is_idle(slurm))
        yield slurm
        with suppress(AssertionError):
            slurm.run("scancel", "--user=root")


def is_idle(slurm: Slurm) -> bool:
    with suppress(AssertionError, subprocess.TimeoutExpired):
        return "idle" in slurm.run("sinfo", "--noheader")
    return False


def with_variable(assignment: str) -> list[int]:
    """The processes whose environment has this."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if assignment.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def test_slurm_accepts_it(slurm: Slurm):
    said = slurm.run("sbatch", "--test-only", str(BATCH_FILE), "--model", "x")
    assert "to start at" in said
    two = slurm.run("sbatch", "--test-only", "--ntasks-per-node=2", str(BATCH_FILE))
    assert "to start at" in two


def test_it_serves_restarts_and_drains(slurm: Slurm, tiny_checkpoint: Path):
    port = free_port()
    flags = [f"--model={tiny_checkpoint}", f"--port={port}", "--max-model-len=256"]
    flags += ["--tensor-parallel-size=1", "--max-num-seqs=2", "--kv-budget=64"]
    job = slurm.submit(flags)
    url = f"http://127.0.0.1:{port}"

    def wait_ready(starts: int) -> None:
        eventually(lambda: slurm.log(job).count("ready: serving on") == starts, START_S)
        assert httpx.get(f"{url}/health", timeout=PATIENCE_S).status_code == 200

    wait_ready(1)
    (server,) = re.findall(r"Started server process \[(\d+)\]", slurm.log(job))
    os.kill(int(server), signal.SIGKILL)
    wait_ready(2)
    assert "the server has failed: starting it again" in slurm.log(job)

    body = {"prompt": "x", "max_tokens": 200, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=PATIENCE_S) as answer:
        lines = answer.iter_lines()
        next(lines)
        slurm.run("scancel", "--signal=TERM", job)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    eventually(lambda: slurm.state(job) not in ("RUNNING", "COMPLETING"))
    assert slurm.state(job) == "COMPLETED"


def test_two_tasks_serve_one_model(slurm: Slurm, tiny_checkpoint: Path):
    """Slurm's environment alone makes a group of them, also again after one task has failed."""
    port = free_port()
    flags = [f"--model={tiny_checkpoint}", f"--port={port}", "--max-model-len=256"]
    flags += ["--tensor-parallel-size=2", "--max-num-seqs=2", "--kv-budget=64"]
    job = slurm.submit(flags, options=["--ntasks-per-node=2"])
    body = {"prompt": "the wall and the inn", "max_tokens": 16, "temperature": 0}

    def answer(starts: int) -> str:
        eventually(lambda: slurm.log(job).count("ready: serving on") == starts, START_S)
        url = f"http://127.0.0.1:{port}/v1/completions"
        return httpx.post(url, json=body, timeout=PATIENCE_S).json()["choices"][0]["text"]

    before = answer(1)
    for follower in with_variable("SLURM_PROCID=1"):
        os.kill(follower, signal.SIGKILL)
    assert answer(2) == before
    slurm.run("scancel", "--signal=TERM", job)
    eventually(lambda: slurm.state(job) not in ("RUNNING", "COMPLETING"))
    assert slurm.state(job) == "COMPLETED"
