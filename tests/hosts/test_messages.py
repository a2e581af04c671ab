"""What is sent between hosts survives it, is small, and nothing else can be read."""

import pickle
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fairkv_jax.config import EngineConfig, KVConfig
from fairkv_jax.engine.page_tables import PageTableUpdate
from fairkv_jax.engine.scheduler_output import Decode, DecodeRow, SchedulerOutput
from fairkv_jax.hosts.messages import Execute, Start, pack, unpack
from fairkv_jax.plan import HeadScores
from fairkv_jax.replay import open_log
from fairkv_jax.sampling_params import SamplingParams
from tests.engine.drive import run
from tests.engine.logged import EMPTY, logged_engine, mixed_requests, plan_with_replicas


def check_same(one: Any, other: Any) -> None:
    """Equal values of equal types, arrays included."""
    assert type(one) is type(other)
    if isinstance(one, np.ndarray):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    elif is_dataclass(one):
        for each in fields(one):
            check_same(getattr(one, each.name), getattr(other, each.name))
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            check_same(left, right)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            check_same(value, other[key])
    else:
        assert one == other


def test_outputs_of_an_engine(tiny_checkpoint: Path, tmp_path: Path):
    log = tmp_path / "log.jsonl"
    engine = logged_engine(tiny_checkpoint, log)
    run(engine, mixed_requests())
    engine.close()
    outputs = [each for each in open_log(log)[1] if isinstance(each, SchedulerOutput)]
    assert len(outputs) > 50
    for number, output in enumerate(outputs):
        found, message = unpack(pack(number, Execute(output)))
        assert found == number
        check_same(message.output, output)


def test_the_first_message():
    kv_config = KVConfig(
        "duo_attention", ratio=0.5, head_scores=HeadScores("m", "gates", ((0.5, 1.0), (0.25, 0.0)))
    )
    engine_config = EngineConfig(max_num_seqs=3, quantization="int8")
    plan = plan_with_replicas(2).to_json()
    start = Start(engine_config, kv_config, plan, 7, "cpu", "abc", (1, 2), None)
    check_same(unpack(pack(0, start))[1], start)


def test_the_largest_sampling_parameters():
    """What a request may ask for must never be what cannot be sent: that would end the group."""
    most = 2**31 - 1
    params = SamplingParams(
        max_tokens=most,
        min_tokens=most,
        top_k=most,
        seed=2**64 - 1,
        stop_token_ids=[most],
        logit_bias={most: 100.0},
        repetition_penalty=1e308,
    )
    check_same(unpack(pack(0, params))[1], params)
    for name in ("max_tokens", "min_tokens", "top_k", "stop_token_ids", "logit_bias"):
        value = {"stop_token_ids": [most + 1], "logit_bias": {most + 1: 1.0}}.get(name, most + 1)
        with pytest.raises(ValueError, match=rf"must be (between .* {most}|at most)"):
            SamplingParams(**{name: value})


def test_a_decode_step_is_small():
    nothing = PageTableUpdate(*[np.zeros(0, np.int32)] * 4)
    decode = Decode((DecodeRow(0, "cmpl-" + "0" * 32, 1000, 10),), 1, {})
    step = replace(EMPTY, page_table_update=nothing, decode=decode)
    assert len(pack(100_000, Execute(step))) < 300


@pytest.mark.parametrize(
    "data",
    [b"", b"\xc1", pickle.dumps(EMPTY), pack(0, Execute(EMPTY))[:-3], b"\x92\x00\xc7\x01\x09\xc0"],
    ids=["empty", "reserved byte", "pickle", "cut short", "unknown type"],
)
def test_other_bytes_are_refused(data: bytes):
    with pytest.raises(ValueError, match=r"cannot be read|unpack|unknown type"):
        unpack(data)


def test_other_objects_are_refused():
    with pytest.raises(TypeError, match="a complex cannot be sent"):
        pack(0, 1j)
