"""Prefills between decode steps, several steps a dispatch, and what requests choose to keep."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fairkv_jax import LLM
from fairkv_jax.engine.llm_engine import LLMEngine
from fairkv_jax.engine.scheduler_output import NewRequest
from fairkv_jax.engine.timings import StepTimer, Timings
from fairkv_jax.sampling_params import SamplingParams
from tests.engine.drive import check_idle, check_owners, greedy, random_prompt, request, run

OPTIONS: dict[str, Any] = {
    "tensor_parallel_size": 2,
    "kv_policy": "ada_snapkv",
    "kv_budget": 48,
    "kv_window": 16,
    "max_model_len": 320,
    "max_num_seqs": 3,
    "prefill_chunk_size": 32,
    "progress": False,
}
LONG, CHUNKS = random_prompt(300), 2 * 10
"""A long prompt, and its chunks in two layers."""


@pytest.fixture(scope="module")
def llm(tiny_checkpoint: Path) -> LLM:
    return LLM(tiny_checkpoint, **OPTIONS)


@pytest.fixture
def engine(llm: LLM) -> LLMEngine:
    check_idle(llm.engine)
    return llm.engine


def least_work(engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """One chunk of a prefill between two steps, and one step at a time: nothing is measured."""
    monkeypatch.setattr(StepTimer, "record", lambda self, *args: None)
    engine._timer.timings = Timings()


@pytest.mark.parametrize("parts", [(1,) * CHUNKS, (3,) * 7, (9, 1, 10), (CHUNKS,)])
def test_a_prefill_in_parts_is_the_whole(engine: LLMEngine, parts: tuple[int, ...]):
    """Wherever it is cut: within a layer, at its end, over several."""
    runner = engine.runner
    whole = runner.prefill(LONG)
    prefill = runner.start_prefill(NewRequest("long", LONG, SamplingParams(), 0))
    assert prefill.shape.num_chunks == CHUNKS
    start = 0
    for count in parts:
        stop = min(start + count, CHUNKS)
        runner.run_chunks(prefill, start, stop)
        start = stop
    assert start == CHUNKS
    np.testing.assert_array_equal(prefill.prefix.slot_lengths, whole.slot_lengths)
    np.testing.assert_array_equal(prefill.prefix.positions, whole.positions)
    for name in ("k", "v", "logits"):
        got, want = getattr(prefill.prefix, name), getattr(whole, name)
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want), name)


def test_blocks_change_nothing(tiny_checkpoint: Path, llm: LLM):
    """The blocks' size is a matter of speed: a prompt of one block says the same."""
    options: dict[str, Any] = OPTIONS | {"prefill_chunk_size": 512}
    other = LLM(tiny_checkpoint, **options)
    prompts = [LONG, random_prompt(33), random_prompt(31)]
    pairs = zip(*(each.generate(prompts, greedy(9)) for each in (llm, other)), strict=True)
    for one, two in pairs:
        assert one.outputs[0].token_ids == two.outputs[0].token_ids
        np.testing.assert_array_equal(one.kv_lengths, two.kv_lengths)  # pyright: ignore[reportArgumentType]


def test_streams_go_on_while_a_long_prompt_is_read(
    engine: LLMEngine, monkeypatch: pytest.MonkeyPatch
):
    streams = [request(name, random_prompt(20, seed), greedy(60)) for seed, name in enumerate("ab")]
    late = request("late", LONG, greedy(5))
    alone = {r.request_id: run(engine, [r])[r.request_id] for r in (*streams, late)}
    least_work(engine, monkeypatch)
    for each in streams:
        engine.add_request(each)
    while len(engine.scheduler.running) < 2:
        engine.step()
    engine.add_request(late)
    advanced = []
    while engine.scheduler.row_of("late") is None:
        advanced.append({output.request_id for output in engine.step()})
        check_owners(engine)
    # The last result is read, and the row given, while another execution is under way.
    assert CHUNKS <= len(advanced) <= CHUNKS + 3
    assert all({"a", "b"} <= names for names in advanced)
    for name, output in run(engine).items():
        assert output.outputs[0].token_ids == alone[name].outputs[0].token_ids
    check_idle(engine)


def test_abort_in_the_middle_of_a_prefill(engine: LLMEngine, monkeypatch: pytest.MonkeyPatch):
    least_work(engine, monkeypatch)
    expected = run(engine, [request("next", random_prompt(40), greedy(6))])["next"]
    engine.add_request(request("long", LONG, greedy(5)))
    engine.add_request(request("next", random_prompt(40), greedy(6)))
    for _ in range(4):
        assert engine.step() == []
    engine.abort_request("long")
    finished = run(engine)
    assert finished["next"].outputs[0].token_ids == expected.outputs[0].token_ids
    check_idle(engine)


def test_who_ends_while_more_is_under_way_disturbs_nobody(
    engine: LLMEngine, monkeypatch: pytest.MonkeyPatch
):
    """Its row has been given further steps already, and somebody else takes it right after."""
    monkeypatch.setattr(StepTimer, "record", lambda self, *args: None)
    engine._timer.timings = Timings(step_seconds=0.01)
    requests = [request(str(i), random_prompt(40 + i), greedy(40)) for i in range(4)]
    expected = {r.request_id: run(engine, [r])[r.request_id].outputs[0] for r in requests}
    ends_early = expected["1"].token_ids[13]
    at = expected["1"].token_ids.index(ends_early)
    requests[1] = request("1", random_prompt(41), greedy(40, stop_token_ids=[ends_early]))
    finished = run(engine, requests, after_step=check_owners)
    for name, output in finished.items():
        want = expected[name].token_ids[: at + 1] if name == "1" else expected[name].token_ids
        assert output.outputs[0].token_ids == want
    check_idle(engine)


@pytest.mark.parametrize(
    ("policy", "budget"), [("streaming_llm", 40), ("snapkv", None), (None, 24), ("ada_snapkv", 48)]
)
def test_a_request_chooses_what_is_kept(
    tiny_checkpoint: Path, engine: LLMEngine, policy: str | None, budget: int | None
):
    """As an engine with these options would keep it, beside others that keep the engine's own."""
    options = {"kv_policy": policy or "ada_snapkv", "kv_budget": budget or 48}
    (want,) = LLM(tiny_checkpoint, **OPTIONS | options).generate(
        [LONG], greedy(8), return_kept_positions=True
    )
    own = request("own", LONG, greedy(8))
    before = run(engine, [own])["own"]
    chosen = request(
        "chosen", LONG, greedy(8), kv_policy=policy, kv_budget=budget, return_kept_positions=True
    )
    finished = run(engine, [own, chosen])
    got = finished["chosen"]
    assert got.outputs[0].token_ids == want.outputs[0].token_ids
    assert got.kept_positions is not None
    assert want.kept_positions is not None
    for ours, theirs in zip(got.kept_positions, want.kept_positions, strict=True):
        for one, two in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(one, two)
    assert finished["own"].outputs[0].token_ids == before.outputs[0].token_ids
    np.testing.assert_array_equal(finished["own"].kv_lengths, before.kv_lengths)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"kv_budget": 49}, "kv_budget 49 is beyond the 48"),
        ({"kv_budget": 15}, "kv_budget 15 is smaller than the window 16"),
        ({"kv_policy": "full"}, "kv_policy 'full' is not for requests"),
        ({"kv_policy": "full", "kv_budget": 48}, "kv_policy 'full' is not for requests"),
        ({"kv_policy": "h2o"}, "kv_policy 'h2o' is not for requests: use one of ada_snapkv, "),
        ({"kv_budget": 0}, "kv_budget must be an integer of at least 1, got 0"),
    ],
)
def test_more_than_the_engine_keeps_is_refused(engine: LLMEngine, wanted: dict, message: str):
    with pytest.raises(ValueError, match=message):
        engine.add_request(request("x", LONG, greedy(2), **wanted))
    assert not engine.has_unfinished_requests()


def test_a_budget_beyond_a_ratio_is_refused(tiny_checkpoint: Path):
    options = OPTIONS | {"kv_budget": None, "kv_ratio": 0.5}
    engine = LLM(tiny_checkpoint, **options).engine
    with pytest.raises(ValueError, match="kv_budget 120 is beyond the 100 tokens per head"):
        engine.add_request(request("x", random_prompt(200), greedy(2), kv_budget=120))
    assert set(run(engine, [request("x", random_prompt(200), greedy(2), kv_budget=90)])) == {"x"}
