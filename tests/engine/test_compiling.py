"""Counts of what JAX compiles."""

import jax
import jax.numpy as jnp
import pytest

from fairkv_jax.engine.compiling import Compilations, CompilingBar


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
    with CompilingBar(2, show=True) as compiled:
        for size in (2, 3):
            program = compiled(f"{size} rows", lambda n: step.lower(jnp.zeros(n)).compile(), size)
            assert program(jnp.zeros(size)).shape == (size,)
    shown = capsys.readouterr().err
    assert "2/2" in shown
    assert "3 rows; 0 from the cache" in shown
