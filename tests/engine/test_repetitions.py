"""KVzip's repetitions of a prompt among other requests: chunks of a prefill like all others."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from fairkv_jax import LLM
from fairkv_jax.engine import scheduler
from tests.engine.drive import check_idle, greedy, random_prompt, request, run

LENGTHS = (300, 40, 170, 9)


@pytest.fixture(scope="module")
def llm(tiny_checkpoint: Path) -> Iterator[LLM]:
    llm = LLM(
        tiny_checkpoint,
        tensor_parallel_size=2,
        kv_policy="kvzip",
        kv_ratio=0.5,
        kv_replay_suffix="!",
        enable_prefix_caching=True,
        max_model_len=512,
        max_num_seqs=4,
        prefill_chunk_size=32,
        progress=False,
    )
    llm.engine.warm_up(range(1, 400), 4, suffix_lengths=[20], prompt_logprobs=False)
    yield llm
    check_idle(llm.engine)


def test_after_warm_up_nothing_compiles(llm: LLM):
    programs = llm.engine.runner.programs
    before = programs.num_compiled
    llm.generate([random_prompt(n) for n in LENGTHS], greedy(4))
    assert programs.num_compiled == before


def test_requests_in_a_batch_get_the_tokens_that_they_get_alone(llm: LLM):
    prompts = [random_prompt(n) for n in LENGTHS]
    alone = [llm.generate([each], greedy(12))[0].outputs[0].token_ids for each in prompts]
    together = [each.outputs[0].token_ids for each in llm.generate(prompts, greedy(12))]
    assert together == alone


def test_an_abort_in_the_middle_of_a_repetition(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scheduler, "_PREFILL_SECONDS", 0.0)  # one chunk at a time
    engine = llm.engine
    prompt = random_prompt(LENGTHS[1])
    (alone,) = llm.generate([prompt], greedy(12))
    valid = engine.validate(request("long", random_prompt(LENGTHS[0]), greedy(12)))
    (segment,) = engine.segments(valid)
    engine.add_request(valid)
    own = engine.scheduler.waiting[0]
    num_before = engine.model_config.num_layers * -(-LENGTHS[0] // 32)
    assert segment.num_cache_chunks > num_before  # there is a repetition to be aborted
    while own.chunks_scheduled <= num_before:
        engine.step()
    assert own.chunks_scheduled < segment.num_cache_chunks
    engine.abort_request("long")
    outputs = run(engine, [request("short", prompt, greedy(12))])
    assert outputs["short"].outputs[0].token_ids == alone.outputs[0].token_ids


def test_a_document_is_compressed_once_and_asked(llm: LLM):
    document = llm.cache_prefix(random_prompt(LENGTHS[0]))
    assert int(document.kept_tokens.sum()) == 6 * LENGTHS[0] - int(6 * LENGTHS[0] * 0.5)
    questions = [random_prompt(20, seed=seed) for seed in (1, 2)]
    first = llm.generate(questions, greedy(6), prefix_id=document.id)
    assert [each.num_cached_tokens for each in first] == [LENGTHS[0]] * 2
    llm.engine.scheduler.prefixes.evict_unused()  # it is computed again, repetition included
    again = llm.generate(questions, greedy(6), prefix_id=document.id)
    assert [x.outputs[0].token_ids for x in again] == [x.outputs[0].token_ids for x in first]
    llm.delete_prefix(document.id)
