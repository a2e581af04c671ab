"""The log lines of a starting server."""

import logging
from types import SimpleNamespace

import pytest

from fairkv_jax.plan import CostModel, Plan, Replica
from fairkv_jax.serve.__main__ import hide_missing_tpu
from fairkv_jax.serve.startup import MAX_PLAN_LINES, plan_table


def _plan(num_layers: int) -> Plan:
    """Layers alternate between two assignments, so that no two neighbours share a line."""
    layers = (
        (Replica(0, 0, 1.0), Replica(1, 1, 1.0)),
        (Replica(0, 0, 0.5), Replica(0, 1, 0.5), Replica(1, 1, 1.0)),
    )
    return Plan(
        strategy="fair_copying",
        row_split="equal",
        num_devices=2,
        num_heads=2,
        layers=tuple(layers[layer % 2] for layer in range(num_layers)),
        cost=CostModel(1.0, 1.0, batch=1),
        utilization=0.5,
        step_seconds=1.0,
        lower_bound_seconds=1.0,
    )


def test_a_short_plan_is_shown_whole():
    lines = plan_table(_plan(MAX_PLAN_LINES - 2))
    assert len(lines) == MAX_PLAN_LINES
    assert [line.split()[0] for line in lines[2:]] == [str(i) for i in range(len(lines) - 2)]
    assert lines[3].split() == ["1", "0", "(50%)", "0", "(50%)", "1"]


def test_a_long_plan_is_summarised():
    lines = plan_table(_plan(MAX_PLAN_LINES - 1))
    text = "\n".join(lines)
    assert len(lines) < 8
    assert "39 layers" in text
    assert "19 extra replicas for 19 of 78 heads, at most 1 per layer" in text
    assert "GET /plan" in text


@pytest.fixture
def bridge():
    logger = logging.getLogger("jax._src.xla_bridge")
    before = SimpleNamespace(filters=list(logger.filters), level=logger.level)
    logger.setLevel(logging.INFO)
    yield logger
    logger.filters[:] = before.filters
    logger.setLevel(before.level)


def test_only_the_message_about_a_missing_tpu_is_hidden(
    bridge: logging.Logger, caplog: pytest.LogCaptureFixture
):
    message = "Unable to initialize backend '%s': INTERNAL"
    bridge.info(message, "tpu")
    assert caplog.messages == ["Unable to initialize backend 'tpu': INTERNAL"]
    caplog.clear()
    hide_missing_tpu()
    bridge.info(message, "tpu")
    bridge.info(message, "cuda")
    bridge.warning(message, "tpu")
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
