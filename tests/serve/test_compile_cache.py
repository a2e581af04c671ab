"""Damaged entries of the compilation cache: replaced once, and not warned of again."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve.live import Process, own_devices

PROGRAM = """
import logging, os, sys
logging.basicConfig(format="%(message)s")
from fairkv_jax.serve.compile_cache import complete_entries, replace_damaged_entries
complete_entries(os.environ["JAX_COMPILATION_CACHE_DIR"])
replace_damaged_entries(os.environ["JAX_COMPILATION_CACHE_DIR"])
import jax
print(jax.jit(lambda x: x * FACTOR + 1)(2))
"""


def run(folder: Path, factor: int = 3) -> str:
    """Runs a program; returns what is logged."""
    settings = {
        "JAX_COMPILATION_CACHE_MAX_SIZE": str(1 << 30),
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("FACTOR", str(factor))],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == f"{2 * factor + 1}\n"
    return result.stderr


@pytest.mark.long
def test_the_server_replaces_them(checkpoint: Path, tmp_path: Path):
    arguments = [f"--model={checkpoint}", "--port=0", "--max-model-len=64", "--max-num-seqs=1"]
    arguments.append(f"--compilation-cache-dir={tmp_path}")
    for is_damaged in (False, True):
        with Process(
            "fairkv_jax.serve", arguments, JAX_COMPILATION_CACHE_DIR=str(tmp_path), **own_devices()
        ) as process:
            process.wait_ready(400.0)
            assert ("a damaged entry" in process.log) == is_damaged
            process.send(signal.SIGTERM)
            assert process.status() == 0
        for entry in tmp_path.glob("*-cache"):
            entry.write_bytes(b"")


@pytest.mark.parametrize("damage", ["empty", "cut", "overwritten"])
def test_damaged_entries_are_replaced(tmp_path: Path, damage: str):
    assert "damaged" not in run(tmp_path)
    (entry,) = tmp_path.glob("jit__lambda*-cache")
    intact = entry.read_bytes()
    half = intact[: len(intact) // 2]
    entry.write_bytes({"empty": b"", "cut": half, "overwritten": b"\xff" * len(intact)}[damage])
    assert "a damaged entry of the compilation cache is replaced: jit__lambda" in run(tmp_path)
    assert len(entry.read_bytes()) > len(half)
    assert "damaged" not in run(tmp_path)


def test_an_entry_that_a_killed_process_left_does_not_stop_the_cache(tmp_path: Path):
    run(tmp_path)
    (used,) = tmp_path.glob("jit__lambda*-atime")
    used.unlink()
    assert "Error writing" not in run(tmp_path, factor=4)
    assert len(list(tmp_path.glob("jit__lambda*-cache"))) == 2
