"""Counts of what JAX compiles."""

import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from fairkv_jax.engine.compiling import Compilations, compile_all


def test_whatever_is_compiled_is_counted_once():
    before, counted = Compilations(), Compilations()
    double = jax.jit(lambda x: x * 2)
    vectors = [jnp.zeros(size, jnp.float32) for size in (3, 4)]
    started = counted.count
    for vector in (*vectors, *vectors):
        double(vector)
    assert counted.count == started + 2
    assert before.count >= counted.count


def test_the_bar_says_how_many_and_which(capsys: pytest.CaptureFixture[str]):
    step = jax.jit(lambda x: x + 1)
    programs = {}

    def make(size: int) -> None:
        programs[size] = step.lower(jnp.zeros(size)).compile()

    compile_all([(f"{n} rows", partial(make, n)) for n in (2, 3)], show=True)
    assert {size: program(jnp.zeros(size)).shape for size, program in programs.items()} == {
        2: (2,),
        3: (3,),
    }
    shown = capsys.readouterr().err
    assert "2/2" in shown
    assert " rows; 0 from the cache" in shown


def test_programs_compile_side_by_side(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    both = threading.Barrier(2)
    compile_all([("a", lambda: both.wait(20)), ("b", lambda: both.wait(20))], show=False)


def test_a_program_that_does_not_compile_ends_the_rest():
    def fail() -> None:
        raise RuntimeError("too many registers")

    with pytest.raises(RuntimeError, match="too many registers"):
        compile_all([("good", lambda: None), ("bad", fail), ("good", lambda: None)], show=False)


BAR = """
from functools import partial
import jax, jax.numpy as jnp
from fairkv_jax.engine.compiling import compile_all

# What prepares a program compiles as well.
def make(size):
    jax.jit(lambda x: x + 1).lower(jnp.zeros(size) * 2).compile()

compile_all([("x", partial(make, size)) for size in (2, 3)], show=True)
"""


def test_what_the_cache_has_had_is_said(tmp_path: Path):
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    for found in (0, 2):
        command = [sys.executable, "-c", BAR]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        assert done.stderr.rstrip().endswith(f"x; {found} from the cache]"), done.stderr
