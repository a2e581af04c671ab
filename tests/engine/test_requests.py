"""Requests that come, run, stop and leave, on a tiny model over two devices."""

import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fairkv_jax import LLM, SamplingParams
from fairkv_jax.engine.llm_engine import LLMEngine
from fairkv_jax.engine.request import CompletionOutput, Request, ValidatedRequest
from fairkv_jax.engine.timings import StepTimer, Timings
from tests.engine.drive import (
    alone,
    check_owners,
    greedy,
    random_prompt,
    request,
    run,
)

EOS = 2
PROMPT = random_prompt(30, seed=4)
OPTIONS: dict[str, Any] = {
    "tensor_parallel_size": 2,
    "kv_policy": "ada_snapkv",
    "kv_budget": 24,
    "kv_window": 8,
    "max_model_len": 128,
    "max_num_seqs": 6,
    "progress": False,
}


@pytest.fixture(scope="module")
def llm(tiny_checkpoint: Path) -> LLM:
    return LLM(model=tiny_checkpoint, **OPTIONS)


@pytest.fixture(scope="module")
def free_run(llm: LLM) -> CompletionOutput:
    """Greedy from PROMPT, without any stop."""
    return llm.generate(PROMPT, greedy(40))[0].outputs[0]


def seeded(seed: int, max_tokens: int = 20, **options) -> SamplingParams:
    return SamplingParams(seed=seed, max_tokens=max_tokens, ignore_eos=True, **options)


def mixed_requests() -> list[Request]:
    """Short and compressed prompts, greedy and sampled, short and long outputs."""
    cases = [
        (5, greedy(25)),
        (60, seeded(1, 12)),
        (30, seeded(2, 30, temperature=0.8, top_k=20)),
        (64, greedy(3)),
        (1, seeded(3, 1)),
        (40, seeded(4, 17, top_p=0.9, min_p=0.01)),
        (50, greedy(20, logprobs=1)),
        (33, seeded(5, 8, temperature=2.0)),
    ]
    return [
        request(str(i), random_prompt(length), params) for i, (length, params) in enumerate(cases)
    ]


@pytest.mark.parametrize("pause", [0, 1, 4])
def test_who_else_runs_changes_no_output(engine: LLMEngine, pause: int):
    """Eight requests, six rows: all at once, and one every few steps, in other rows than alone."""
    requests = mixed_requests()
    expected = alone(engine, requests)
    finished, steps, left = {}, 0, requests[::-1]
    while left or engine.has_unfinished_requests():
        if left and steps % (pause + 1) == 0:
            engine.add_request(left.pop())
            while left and not pause:
                engine.add_request(left.pop())
        finished |= {out.request_id: out for out in engine.step() if out.finished}
        check_owners(engine)
        steps += 1
    for name, (token_ids, text) in expected.items():
        assert finished[name].outputs[0].token_ids == token_ids
        assert finished[name].outputs[0].text == text


def test_a_seed_gives_the_same_text_in_every_row_among_others(engine: LLMEngine):
    mine = request("mine", PROMPT, seeded(99, 15, temperature=1.5))
    (expected,) = alone(engine, [mine]).values()
    rows = set()
    for place in (0, 3, 5):
        others = [
            request(f"{i}", random_prompt(10 + i, seed=i), seeded(i, 60 + 3 * i)) for i in range(5)
        ]

        def look(engine: LLMEngine) -> None:
            rows.add(engine.scheduler.row_of("mine"))

        outputs = run(engine, [*others[:place], mine, *others[place:]], look)
        assert (outputs["mine"].outputs[0].token_ids, outputs["mine"].outputs[0].text) == expected
    assert {0, 3, 5} <= rows


def test_without_a_seed_requests_differ(llm: LLM):
    params = SamplingParams(temperature=2.0, max_tokens=12, ignore_eos=True)
    outputs = llm.generate([PROMPT] * 3, params)
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 3


@pytest.mark.parametrize("num_steps", [1, 3])
def test_every_step_tells_who_advanced(
    engine: LLMEngine, num_steps: int, monkeypatch: pytest.MonkeyPatch
):
    """The first token, then those of each execution."""
    monkeypatch.setattr(StepTimer, "record", lambda self, *args: None)
    engine._timer.timings = Timings(step_seconds=0.04 / num_steps)
    engine.add_request(request("a", PROMPT, greedy(6)))
    counts = []
    while engine.has_unfinished_requests():
        for output in engine.step():
            counts.append(len(output.outputs[0].token_ids))
            assert output.finished == (counts[-1] == 6)
            assert (output.outputs[0].finish_reason == "length") == output.finished
    assert counts == {1: [1, 2, 3, 4, 5, 6], 3: [1, 4, 6]}[num_steps]


def test_abort_frees_at_once(engine: LLMEngine):
    for name in ("a", "b"):
        engine.add_request(request(name, random_prompt(60), greedy(50)))
    for _ in range(4):
        engine.step()
    both = engine.scheduler.kv_cache.used_pages
    engine.abort_request("a")
    engine.abort_request("a")  # again, and unknown: nothing happens
    engine.abort_request("nobody")
    left = engine.scheduler.kv_cache.used_pages
    assert (left < both).all()
    check_owners(engine)
    engine.step()
    check_owners(engine)
    engine.abort_request("b")


def test_stats_and_times(engine: LLMEngine):
    """What the page and the metrics show: who runs and waits, what is full, when it happened."""
    for i in range(8):
        engine.add_request(request(str(i), PROMPT, greedy(20)))
    assert (engine.stats().num_running, engine.stats().num_waiting) == (0, 8)
    before = time.monotonic()
    while len(engine.scheduler.running) < 2:
        outputs = engine.step()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_preemptions) == (2, 6, 0)
    assert stats.used_pages == tuple(engine.scheduler.kv_cache.used_pages)
    assert sum(stats.kv_tokens) == engine.scheduler.kv_cache.lengths.sum() > 0
    times = outputs[0].metrics
    assert times is not None
    steps = (times.first_scheduled_time, times.prefill_finished_time, times.last_token_time)
    order = [times.arrival_time, before, *(step for step in steps if step is not None)]
    assert len(order) == 5
    assert order == sorted(order)
    run(engine)
    assert engine.stats().num_running == engine.stats().num_waiting == 0


def test_abort_while_it_waits(engine: LLMEngine):
    requests = [request(str(i), PROMPT, greedy(4)) for i in range(9)]
    for each in requests:
        engine.add_request(each)
    engine.step()
    engine.abort_request("8")
    engine.abort_request("3")
    assert set(run(engine)) == {"0", "1", "2", "4", "5", "6", "7"}


def test_stop_strings_end_the_text_before_them(llm: LLM, engine: LLMEngine, free_run):
    text = free_run.text
    for start in (0, 4, 11):
        for size in (1, 2, 5):
            stop = text[start : start + size]
            output = llm.generate(PROMPT, greedy(40, stop=stop))[0].outputs[0]
            assert output.text == text[: text.index(stop)]
            assert (output.finish_reason, output.stop_reason) == ("stop", stop)
            assert output.token_ids == free_run.token_ids[: len(output.token_ids)]
            with_stop = greedy(40, stop=[stop], include_stop_str_in_output=True)
            output = llm.generate(PROMPT, with_stop)[0].outputs[0]
            assert output.text == text[: text.index(stop) + size]


def test_a_stop_string_split_over_tokens(llm: LLM, engine: LLMEngine, free_run):
    """It is found where the second token completes it, and its first half is never shown."""
    texts = [llm.get_tokenizer().decode(free_run.token_ids[:n], True) for n in range(1, 41)]
    before, after = next(
        (before, after)
        for before, after in pairwise(texts[3:])
        if before != after
        and after.startswith(before)
        and len(before) > 2
        and "\ufffd" not in before[-1] + after[len(before)]
        and (before[-1] + after[len(before)]) not in before
    )
    stop = before[-1] + after[len(before)]
    shown = []
    engine.add_request(request("a", PROMPT, greedy(40, stop=stop)))
    while engine.has_unfinished_requests():
        shown += [output.outputs[0].text for output in engine.step()]
    assert shown[-1] == before[:-1]
    for earlier, later in pairwise(shown):
        assert later.startswith(earlier)


def test_the_earliest_of_several_stop_strings_wins(llm: LLM, engine: LLMEngine, free_run):
    first, second = free_run.text[6:8], free_run.text[2:4]
    output = llm.generate(PROMPT, greedy(40, stop=[first, second]))[0].outputs[0]
    assert output.stop_reason == second
    assert output.text == free_run.text[: free_run.text.index(second)]


def test_what_was_held_back_is_shown_in_the_end(llm: LLM, engine: LLMEngine, free_run):
    """The stop string has begun, but the tokens run out before it is whole."""
    stop = free_run.text[-2:] + "never"
    assert llm.generate(PROMPT, greedy(40, stop=stop))[0].outputs[0].text == free_run.text


def test_stop_token_ids(llm: LLM, engine: LLMEngine, free_run):
    """The token ends the output and counts, its text does not show unless asked for."""
    ids = free_run.token_ids
    at = next(n for n in range(3, 40) if ids.index(ids[n]) == n)
    decode = llm.get_tokenizer().decode
    output = llm.generate(PROMPT, greedy(40, stop_token_ids=[383, ids[at]]))[0].outputs[0]
    assert output.token_ids == ids[: at + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", ids[at])
    assert output.text == decode(ids[:at])
    shown = greedy(40, stop_token_ids=[ids[at]], include_stop_str_in_output=True)
    assert llm.generate(PROMPT, shown)[0].outputs[0].text == decode(ids[: at + 1])


def test_end_of_text(llm: LLM, engine: LLMEngine):
    """Hot sampling finds the token; with it, the same seed stops there unless told to ignore it."""
    hot = {"temperature": 8.0, "max_tokens": 90}
    for seed in range(40):
        (ignoring,) = llm.generate(PROMPT, SamplingParams(seed=seed, ignore_eos=True, **hot))
        ids = ignoring.outputs[0].token_ids
        assert len(ids) == 90
        if EOS in ids[2:] and EOS not in ids[:2]:
            break
    else:
        pytest.fail("no seed gave the token: choose others")
    end = ids.index(EOS)
    output = llm.generate(PROMPT, SamplingParams(seed=seed, **hot))[0].outputs[0]
    assert output.token_ids == ids[: end + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", None)
    assert output.text == llm.get_tokenizer().decode(ids[:end], True)


@pytest.mark.parametrize(("prompt_tokens", "max_tokens"), [(100, None), (127, None), (120, 99)])
def test_the_context_bounds_the_output(
    llm: LLM, engine: LLMEngine, prompt_tokens: int, max_tokens: int | None
):
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    output = llm.generate(random_prompt(prompt_tokens), params)[0].outputs[0]
    assert len(output.token_ids) == 128 - prompt_tokens
    assert output.finish_reason == "length"


def test_nothing_is_left_under_way_when_all_have_ended(engine: LLMEngine, free_run):
    """Else the time until the next request would count as that of a decode step."""
    at = next(n for n in range(6, 40) if free_run.token_ids.index(free_run.token_ids[n]) == n)
    stop = greedy(60, stop_token_ids=[free_run.token_ids[at]])
    run(engine, [request("stops", PROMPT, stop)])
    assert not engine._in_flight
    engine.add_request(request("aborted", PROMPT, greedy(60)))
    while engine.scheduler.row_of("aborted") is None:
        engine.step()
    engine.abort_request("aborted")
    assert not engine._in_flight
    seconds = engine._timer.timings.step_seconds
    assert seconds is not None
    time.sleep(20 * seconds)
    engine.add_request(request("next", PROMPT, greedy(2)))
    engine.step()
    assert engine._timer.timings.step_seconds == seconds
    run(engine)


def test_one_token(llm: LLM, engine: LLMEngine, free_run):
    output = llm.generate(PROMPT, greedy(1))[0]
    assert output.outputs[0].token_ids == free_run.token_ids[:1]
    assert output.finished
    assert output.kv_lengths is not None
    assert output.kv_lengths.shape == (2, 3)
    assert output.kept_positions is None


@pytest.mark.parametrize("count", [0, 1, 5, 20])
def test_logprobs(llm: LLM, engine: LLMEngine, count: int):
    """The chosen token and the likeliest ones; the first are those of the prefill's logits."""
    params = seeded(7, 6, temperature=3.0, logprobs=count)
    output = llm.generate(PROMPT, params)[0].outputs[0]
    assert output.logprobs is not None
    logits = llm.prefill_logits(PROMPT).astype(np.float64)
    want = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    first = output.logprobs[0]
    assert set(first) == {output.token_ids[0], *np.argsort(-want)[:count].tolist()}
    for token, logprob in first.items():
        assert logprob.logprob == pytest.approx(want[token], abs=1e-4)
        assert logprob.rank == 1 + (want > want[token]).sum()
    for token, step in zip(output.token_ids, output.logprobs, strict=True):
        assert len(step) in (count, count + 1)
        assert token in step
        ranks = sorted(entry.rank for entry in step.values())
        assert ranks[:count] == list(range(1, count + 1))
        for each, entry in step.items():
            assert entry.decoded_token == llm.get_tokenizer().token_text(each)
    assert any(step[t].rank > 1 for t, step in zip(output.token_ids, output.logprobs, strict=True))


def test_no_logprobs_unless_asked_for(free_run: CompletionOutput):
    assert free_run.logprobs is None


def test_a_validated_request_is_not_validated_again(
    engine: LLMEngine, monkeypatch: pytest.MonkeyPatch
):
    checked = []
    original = LLMEngine.validate

    def validate(self: LLMEngine, request: Request) -> ValidatedRequest:
        checked.append(request.request_id)
        return original(self, request)

    monkeypatch.setattr(LLMEngine, "validate", validate)
    engine.add_request(engine.validate(request("validated", PROMPT, greedy(2))))
    assert checked == ["validated"]
    engine.add_request(request("plain", PROMPT, greedy(2)))
    assert checked == ["validated", "plain"]
    outputs = run(engine)
    assert outputs["validated"].outputs[0].token_ids == outputs["plain"].outputs[0].token_ids
