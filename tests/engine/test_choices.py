"""Several answers to one prompt, which is read once: the same tokens as alone, in shared pages."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fairkv_jax import LLM, SamplingParams
from fairkv_jax.engine.request import Request
from fairkv_jax.plan import Profile, make_plan
from fairkv_jax.replay import open_log, replay
from tests.engine.drive import check_idle, check_owners, random_prompt, run

PROMPT = random_prompt(100)
SAMPLED = {"max_tokens": 30, "temperature": 1.0, "ignore_eos": True, "logprobs": 2}


def make_llm(checkpoint: Path, num_devices: int, **options: Any) -> LLM:
    tokens = ((100.0, 30.0, 20.0), (15.0, 25.0, 90.0))
    profile = Profile(model="", policy="ada_snapkv", budget=50, tokens=tokens)
    plan = make_plan(profile, num_devices, "fair_copying")
    return LLM(
        model=checkpoint,
        max_model_len=256,
        max_num_seqs=4,
        prefill_chunk_size=16,
        tensor_parallel_size=num_devices,
        head_plan=plan,
        progress=False,
        **options,
    )


def choices(count: int, same_prompt: str, **options: Any) -> list[Request]:
    return [
        Request(
            str(i), PROMPT, SamplingParams(**SAMPLED | options, seed=i), same_prompt=same_prompt
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("num_devices", [pytest.param(1, marks=pytest.mark.long), 3])
def test_choices_are_those_of_prompts_of_their_own(
    tiny_checkpoint: Path, num_devices: int, tmp_path: Path
):
    """More than there are rows; a method that looks at the question; then the log is replayed."""
    log = tmp_path / "log.jsonl"
    llm = make_llm(
        tiny_checkpoint,
        num_devices,
        kv_policy="ada_snapkv",
        kv_budget=48,
        schedule_log=log,
        schedule_log_prompts=True,
    )
    engine = llm.engine
    engine.warm_up([len(PROMPT)], 4, forks=True)
    compiled = engine.stats().compilations
    started = []
    start = engine.runner.start_prefill
    engine.runner.start_prefill = lambda *args, **options: (
        started.append(args[0].request_id) or start(*args, **options)
    )
    together = run(engine, choices(6, "a"), check_owners)
    assert started == ["0"]
    apart = run(engine, choices(6, ""), check_owners)
    assert len(started) == 7
    for name, output in together.items():
        alone = apart[name].outputs[0]
        assert output.outputs[0].token_ids == alone.token_ids
        assert output.outputs[0].logprobs is not None
        assert alone.logprobs is not None
        for token, mine, theirs in zip(
            alone.token_ids, output.outputs[0].logprobs, alone.logprobs, strict=True
        ):
            assert mine[token].logprob == pytest.approx(theirs[token].logprob, abs=1e-3)
        np.testing.assert_array_equal(output.kv_lengths, apart[name].kv_lengths)
        assert output.metrics is not None
        assert output.metrics.first_scheduled_time is not None
    assert len({tuple(each.outputs[0].token_ids) for each in together.values()}) == 6
    assert engine.stats().compilations == compiled
    check_idle(engine)
    engine.close()
    assert replay(*open_log(log)).num_tokens == 2 * 6 * 30


def test_rows_of_choices_share_full_pages(tiny_checkpoint: Path):
    """And what they append is their own: only then do pages become more."""
    engine = make_llm(tiny_checkpoint, 1).engine
    page, heads = engine.runner.cache_spec.page_size, 6
    for request in choices(4, "a"):
        engine.add_request(request)
    while len(engine.scheduler.running) < 4:
        engine.step()
    check_owners(engine)
    used = engine.scheduler.kv_cache.used_pages.sum()
    assert used <= heads * (len(PROMPT) // page + 4 * 2)
    run(engine)
    check_idle(engine)
