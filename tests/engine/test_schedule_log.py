"""The schedule log: what is written, that it is read back unchanged, and what it never holds."""

import json
import typing
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairkv_jax.checkpoint import open_checkpoint
from fairkv_jax.engine import schedule_log
from fairkv_jax.engine.build import build_engine
from fairkv_jax.engine.page_tables import PageTableUpdate
from fairkv_jax.engine.schedule_log import (
    Header,
    LoggedTokens,
    ScheduleLog,
    fingerprint,
    read_log,
)
from fairkv_jax.engine.scheduler_output import (
    Decode,
    DecodeRow,
    ExecutionResult,
    Insertion,
    NewRequest,
    PrefillChunks,
    SampledTokens,
    SchedulerOutput,
)
from fairkv_jax.sampling_params import SamplingParams, StructuredOutputsParams
from tests.engine.logged import (
    EMPTY,
    HEADER,
    logged_engine,
    mixed_requests,
    run_with_aborts,
)
from tests.oracle.tiny import write_tiny_checkpoint

ids = st.lists(st.integers(0, 2**31 - 1), max_size=4)
words = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=3).map(
    lambda each: np.array(each, np.uint32)
)
indices = st.lists(st.integers(0, 2**40), max_size=3).map(lambda each: np.array(each, np.int64))
text = st.text(min_size=1, max_size=5)
structured = st.one_of(
    st.builds(StructuredOutputsParams, regex=text),
    st.builds(StructuredOutputsParams, choice=st.lists(text, min_size=1, max_size=3)),
    st.builds(StructuredOutputsParams, json=st.just({"type": "object", "items": [1, {"a": None}]})),
    st.just(StructuredOutputsParams(json_object=True)),
)
sampling_params = st.builds(
    SamplingParams,
    max_tokens=st.none() | st.integers(0, 9),
    temperature=st.floats(0, 5),
    top_p=st.floats(0.1, 1),
    logit_bias=st.none() | st.dictionaries(st.integers(0, 99), st.floats(-100, 100), max_size=3),
    structured_outputs=st.none() | structured,
    seed=st.none() | st.integers(-(2**63), 2**64 - 1),
    stop=st.none() | text | st.lists(text, max_size=3),
    stop_token_ids=st.none() | ids,
    ignore_eos=st.booleans(),
    logprobs=st.none() | st.integers(0, 20),
)
new_request = st.builds(
    NewRequest,
    request_id=text,
    prompt_token_ids=ids,
    sampling_params=sampling_params,
    seed=st.integers(-(2**63), 2**64 - 1),
    kv_policy=st.none() | st.just("snapkv"),
    kv_budget=st.none() | st.integers(1, 99),
    return_kept_positions=st.booleans(),
)
prefill_chunks = st.builds(
    PrefillChunks,
    request_id=text,
    start=st.integers(0, 9),
    stop=st.integers(0, 9),
    num_chunks=st.integers(0, 9),
    work=st.floats(0, 1e12),
    new_request=st.none() | new_request,
    samples_token=st.booleans(),
    grammar_bitmask=st.none() | words,
)
insertion = st.builds(
    Insertion,
    request_id=text,
    row=st.integers(0, 9),
    slot_lengths=ids.map(lambda each: np.array([each, each], np.int32)),
    output_token_ids=ids,
)
decode = st.builds(
    Decode,
    rows=st.lists(
        st.builds(DecodeRow, *(st.integers(0, 9), text, st.integers(0, 9), st.integers(0, 9))),
        min_size=1,
        max_size=3,
    ).map(tuple),
    num_steps=st.integers(1, 9),
    grammar_bitmasks=st.dictionaries(st.integers(0, 9), words, max_size=3),
)
outputs = st.builds(
    SchedulerOutput,
    index=st.integers(0, 9),
    preempted_request_ids=st.lists(text, max_size=2).map(tuple),
    finished_request_ids=st.lists(text, max_size=2).map(tuple),
    released_rows=st.lists(st.integers(0, 9), max_size=2).map(tuple),
    page_table_update=st.builds(PageTableUpdate, indices, indices, indices, indices),
    insertion=st.none() | insertion,
    prefill=st.none() | prefill_chunks,
    decode=st.none() | decode,
)


def assert_same(one: Any, two: Any) -> None:
    """Both have the same types and values, arrays included."""
    assert type(one) is type(two)
    if is_dataclass(one):
        for field in fields(one):
            assert_same(getattr(one, field.name), getattr(two, field.name))
    elif isinstance(one, list | tuple):
        assert len(one) == len(two)
        for parts in zip(one, two, strict=True):
            assert_same(*parts)
    elif isinstance(one, dict):
        assert_same(list(one.items()), list(two.items()))
    elif isinstance(one, np.ndarray):
        assert one.dtype == two.dtype
        np.testing.assert_array_equal(one, two)
    else:
        assert one == two


def result_of(output: SchedulerOutput, tokens: list[list[int]]) -> ExecutionResult:
    array = np.array(tokens)
    return ExecutionResult(None, SampledTokens(array, array, array, array, array))


@given(output=outputs)
def test_outputs_are_read_back_unchanged(
    tmp_path_factory: pytest.TempPathFactory, output: SchedulerOutput
):
    path = tmp_path_factory.mktemp("log") / "log"
    log = ScheduleLog(path, HEADER)
    log.write_output(output)
    log.close()
    _, read = read_log(path)
    assert_same(read, output)


def test_headers_and_results_are_read_back_unchanged(tmp_path: Path):
    log = ScheduleLog(tmp_path / "log", HEADER)
    rows = (DecodeRow(0, "a", 1, 1), DecodeRow(2, "b", 1, 1))
    output = replace(EMPTY, decode=Decode(rows, 2, {}))
    log.write_result(output, result_of(output, [[5, 6, 7], [8, 9, 10], [0, 0, 0]]))
    log.close()
    header, result = read_log(tmp_path / "log")
    assert_same(header, HEADER)
    assert result == LoggedTokens(4, None, [[5, 7], [8, 10]])


def test_every_part_of_an_output_can_be_written():
    """A dataclass that an output may hold, but that cannot be read back, fails here."""

    def classes_in(hint: Any) -> set[Any]:
        found: set[Any] = {hint} if is_dataclass(hint) else set()
        parts = typing.get_type_hints(hint).values() if found else typing.get_args(hint)
        return found.union(*map(classes_in, parts))

    assert classes_in(SchedulerOutput) == set(schedule_log._CLASSES.values())


def test_an_engine_logs_everything_that_it_executes(tiny_checkpoint: Path, tmp_path: Path):
    path = tmp_path / "log"
    engine = logged_engine(tiny_checkpoint, path)
    tokens = run_with_aborts(engine, mixed_requests())
    assert engine.scheduler.num_preemptions > 0
    engine.close()
    header, *entries = read_log(path)
    assert isinstance(header, Header)
    assert header.model == str(tiny_checkpoint)
    assert header.fingerprint == fingerprint(open_checkpoint(tiny_checkpoint))
    assert (header.plan, header.has_prompts) == (engine.plan, True)
    assert (header.engine_config, header.kv_config) == (engine.engine_config, engine.kv_config)
    executed = [each for each in entries if isinstance(each, SchedulerOutput)]
    assert [each.index for each in executed] == list(range(len(executed)))
    new = [e.prefill.new_request for e in executed if e.prefill and e.prefill.new_request]
    prompts = {each.request_id: each.prompt_token_ids for each in new}
    assert prompts == {each.request_id: each.prompt_token_ids for each in mixed_requests()}
    assert any(each.preempted_request_ids for each in executed)
    assert any(each.decode and each.decode.grammar_bitmasks for each in executed)
    assert max(each.decode.num_steps for each in executed if each.decode) > 1
    assert len({each.seed for each in new}) > 3, "seeds that the engine drew are in the log"
    results = [each for each in entries if isinstance(each, LoggedTokens)]
    by_index = {each.index: each for each in executed}
    logged: dict[str, list[int]] = {}
    for result in results:
        output = by_index[result.index]
        if result.first_token is not None:
            assert output.prefill is not None
            logged[output.prefill.request_id] = [result.first_token]
        for step in result.tokens:
            assert output.decode is not None
            for row, token in zip(output.decode.rows, step, strict=True):
                logged[row.request_id] += [token]
    assert logged["3"][:45] == tokens["3"], "a request that was never preempted"


def test_without_prompts_the_log_depends_on_no_token(tiny_checkpoint: Path, tmp_path: Path):
    """Requests that differ only in their prompts write the same log, byte by byte.

    Everything is kept, as kept lengths do depend on a prompt. The grammars differ too.
    """
    logs, produced = [], []
    for seed in (0, 1):
        path = tmp_path / str(seed)
        engine = logged_engine(
            tiny_checkpoint, path, prompts=False, kv_policy="full", kv_budget=None
        )
        requests = [
            replace(
                each,
                kv_policy=None,
                kv_budget=None,
                sampling_params=with_texts_of(each.sampling_params, seed),
            )
            for each in mixed_requests(seed)
        ]
        produced.append(run_with_aborts(engine, requests))
        engine.close()
        logs.append(path.read_text())
    assert produced[0]["5"] != produced[1]["5"], "the outputs that follow grammars differ"
    assert logs[0] == logs[1]
    assert '"result"' not in logs[0]


def with_texts_of(params: SamplingParams, seed: int) -> SamplingParams:
    """The same options with another grammar and other stop strings."""
    digits = StructuredOutputsParams(regex=f"[{seed}{seed + 2}]{{60}}")
    return replace(
        params,
        structured_outputs=params.structured_outputs and digits,
        stop=("~~~~" if seed else "zzzz") if params.stop else None,
    )


def test_prompts_are_in_the_log_only_if_asked_for(tiny_checkpoint: Path, tmp_path: Path):
    prompt = list(range(300, 340))
    words, first = json.dumps(prompt, separators=(",", ":")), mixed_requests()[0]
    for prompts in (True, False):
        engine = logged_engine(tiny_checkpoint, tmp_path / "log", prompts=prompts)
        engine.add_request(replace(first, prompt_token_ids=prompt))
        while engine.has_unfinished_requests():
            (*_, tokens) = [output.outputs[0].token_ids for output in engine.step()] or [[]]
        engine.close()
        log = (tmp_path / "log").read_text()
        assert (words in log) == prompts
        assert (f'"first_token":{tokens[0]}' in log) == prompts
        assert ('"tokens"' in log) == prompts


def test_a_header_names_what_opens_the_model(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A relative path is written as an absolute one."""
    monkeypatch.chdir(tiny_checkpoint.parent)
    build_engine(
        tiny_checkpoint.name,
        schedule_log=str(tmp_path / "log"),
        max_model_len=64,
        kv_cache_memory_bytes=1 << 22,
        progress=False,
    ).close()
    (header,) = read_log(tmp_path / "log")
    assert isinstance(header, Header)
    assert header.model == str(tiny_checkpoint.resolve())


def test_fingerprints_tell_weights_apart(tiny_checkpoint: Path, tmp_path: Path):
    """Two checkpoints of the same shape, whose norms are the same as well."""
    one = open_checkpoint(tiny_checkpoint)
    assert fingerprint(one) == fingerprint(open_checkpoint(tiny_checkpoint))
    other = open_checkpoint(write_tiny_checkpoint(tmp_path / "tiny.gguf", seed=1))
    assert other.config == one.config
    assert fingerprint(other) != fingerprint(one)

    @dataclass
    class SameNorms:
        """The other checkpoint with the norms of the first."""

        config = one.config
        names, stored, lazy = one.names, one.stored, other.lazy

        def tensor(self, name: str) -> np.ndarray:
            return one.tensor(name)

    mixed: Any = SameNorms()
    assert fingerprint(mixed) != fingerprint(one)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"schedule_log_prompts": True}, "schedule_log_prompts needs schedule_log: give the path"),
        ({"schedule_log": 3}, "schedule_log must be the path of a file, got 3"),
        ({"schedule_log": "x", "schedule_log_prompts": 1}, "schedule_log_prompts must be True or"),
        ({"schedule_log": "/nowhere/log"}, r"log /nowhere/log cannot be written \(No such file"),
    ],
)
def test_wrong_options(tiny_checkpoint: Path, options: dict[str, Any], sentence: str):
    with pytest.raises(ValueError, match=sentence):
        build_engine(tiny_checkpoint, max_model_len=64, progress=False, **options)


def test_a_full_disk_ends_the_log_but_not_the_engine(caplog: pytest.LogCaptureFixture):
    log = ScheduleLog("/dev/full", HEADER)
    assert "the schedule log /dev/full ends here" in caplog.text
    log.write_output(EMPTY)
    assert caplog.text.count("ends here") == 1
