"""Short prompts that are packed: prefilled in the same chunks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fairkv_jax import LLM, SamplingParams
from fairkv_jax.checkpoint import open_checkpoint
from fairkv_jax.config import EngineConfig, KVConfig
from fairkv_jax.engine.llm_engine import LLMEngine
from fairkv_jax.engine.prefill_chunking import Packing
from fairkv_jax.engine.scheduler_output import PrefillChunks
from tests.engine.drive import check_idle, check_owners, greedy, random_prompt, request, run
from tests.engine.test_requests import OPTIONS as COMPRESSED

PROMPTS = [random_prompt(n, seed=n) for n in (5, 30, 1, 17, 12, 33, 8, 2)]
PARAMS = [
    greedy(12),
    greedy(9, logprobs=2, repetition_penalty=1.3),
    SamplingParams(temperature=1.0, seed=3, max_tokens=7, min_tokens=2, logit_bias={5: 2.0}),
    greedy(1),
    SamplingParams(temperature=0.8, top_k=20, seed=9, max_tokens=12),
    greedy(12),
    greedy(4),
    SamplingParams(temperature=2.0, seed=1, max_tokens=5, logprobs=1),
]
OPTIONS: dict[str, Any] = {
    "max_model_len": 128,
    "max_num_seqs": 4,
    "prefill_chunk_size": 32,
    "progress": False,
}


def watch(llm: LLM) -> list[PrefillChunks]:
    """The first chunks of every prefill that the engine gives to the devices."""
    begun, execute = [], llm.engine.runner.execute

    def watched(output: Any) -> Any:
        if output.prefill is not None and output.prefill.new_request is not None:
            begun.append(output.prefill)
        return execute(output)

    llm.engine.runner.execute = watched
    return begun


def prompts_of(begun: list[PrefillChunks]) -> list[int]:
    return [1 + len(each.packed) for each in begun]


# On two devices a head has two replicas.
@pytest.mark.parametrize("num_devices", [pytest.param(1, marks=pytest.mark.long), 2])
def test_they_change_no_token(tiny_checkpoint: Path, num_devices: int):
    llm = LLM(tiny_checkpoint, tensor_parallel_size=num_devices, **OPTIONS)
    llm.engine.warm_up([len(each) for each in PROMPTS], 4, prompt_logprobs=False)
    begun, compiled = watch(llm), llm.engine.stats().compilations
    alone = [
        llm.generate([prompt], params)[0].outputs[0]
        for prompt, params in zip(PROMPTS, PARAMS, strict=True)
    ]
    assert prompts_of(begun) == [1] * len(PROMPTS)
    begun.clear()
    requests = [
        request(str(index), prompt, params)
        for index, (prompt, params) in enumerate(zip(PROMPTS, PARAMS, strict=True))
    ]
    rows_at_once = []

    def check(engine: LLMEngine) -> None:
        check_owners(engine)
        rows_at_once.append(len(engine.scheduler.running))

    outputs = run(llm.engine, requests, check)
    assert prompts_of(begun)[0] == 4  # as many as there are rows; 53 tokens in two chunks
    assert sum(prompts_of(begun)) == len(PROMPTS)
    # All that need a row get it at once: none waits for the others' decode steps.
    assert next(filter(None, rows_at_once)) == 3
    assert llm.engine.stats().compilations == compiled
    for index, want in enumerate(alone):
        (got,) = outputs[str(index)].outputs
        assert (got.token_ids, got.text) == (want.token_ids, want.text)
        for ours, theirs in zip(got.logprobs or [], want.logprobs or [], strict=True):
            assert [*ours] == [*theirs]
            ours, theirs = ([e.logprob for e in each.values()] for each in (ours, theirs))
            np.testing.assert_allclose(ours, theirs, atol=1e-4)
        assert (outputs[str(index)].kv_lengths == len(PROMPTS[index])).all()
    check_idle(llm.engine)


def test_what_is_compressed_or_wants_more_is_prefilled_apart(tiny_checkpoint: Path):
    """The budget is 24: prompts beyond it, with log-probabilities or with a grammar."""
    llm = LLM(model=tiny_checkpoint, **COMPRESSED)
    begun = watch(llm)
    prompts = [random_prompt(n, seed=n) for n in (10, 9, 30, 8, 7, 6, 5)]
    params = [greedy(3)] * 7
    params[4] = greedy(3, prompt_logprobs=1)
    outputs = llm.generate(prompts, params)
    assert [len(each.outputs[0].token_ids) for each in outputs] == [3] * 7
    assert prompts_of(begun) == [2, 1, 1, 1, 2]
    check_idle(llm.engine)


@pytest.mark.parametrize("name", ["0", "1", "3"])
def test_one_that_is_cancelled_leaves_the_others(tiny_checkpoint: Path, name: str):
    llm = LLM(tiny_checkpoint, **OPTIONS)
    want = [each.outputs[0].token_ids for each in llm.generate(PROMPTS[:4], greedy(12))]
    for steps in range(8):
        for index in range(4):
            llm.engine.add_request(request(str(index), PROMPTS[index], greedy(12)))
        tokens: dict[str, list[int]] = {}
        for step in range(60):
            if step == steps:
                llm.engine.abort_request(name)
            for output in llm.engine.step():
                tokens[output.request_id] = output.outputs[0].token_ids
        assert not llm.engine.has_unfinished_requests()
        for index in range(4):
            if str(index) != name:
                assert tokens[str(index)] == want[index]
        assert llm.engine.runner._task is None, "the prefill holds memory"
        check_idle(llm.engine)


@pytest.mark.parametrize(
    ("kv_config", "max_tokens"),
    [
        (KVConfig(), 64),
        (KVConfig("ada_snapkv", budget=40, window=8), 40),
        (KVConfig("ada_snapkv", budget=100, window=8), 64),
        (KVConfig("streaming_llm", ratio=0.5), 1),
    ],
)
def test_no_more_is_packed_than_is_kept_whole(
    tiny_checkpoint: Path, kv_config: KVConfig, max_tokens: int
):
    config = EngineConfig(max_model_len=128, max_num_seqs=4, prefill_chunk_size=32)
    packing = Packing.of(open_checkpoint(tiny_checkpoint).config, config, kv_config)
    assert (packing.max_tokens, packing.max_prompts) == (max_tokens, 4)
