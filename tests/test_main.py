"""`fairkv COMMAND`: the same commands as `python -m fairkv_jax.COMMAND`."""

import subprocess
import sys

import pytest

from fairkv_jax.__main__ import COMMANDS, main


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fairkv_jax", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_command_gets_its_arguments_and_its_status_is_returned():
    done = run("plan", "--devices=2", "--row_split=nonsense")
    assert done.returncode == 1
    assert "row_split" in done.stderr
    done = run("checkpoint", "inspect", "/nowhere/at-all")
    assert (done.returncode, done.stdout) == (1, "")
    assert "no checkpoint at /nowhere/at-all" in done.stderr


def test_help_names_every_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fairkv"])
    main()
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:-2]] == [*COMMANDS]


def test_an_unknown_command_is_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fairkv", "server"])
    with pytest.raises(SystemExit, match="unknown command 'server': use one of serve, chat"):
        main()
