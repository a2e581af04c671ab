"""Prefixes that are compressed once and asked many times: what they save, and never change."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fairkv_jax import LLM, SamplingParams
from fairkv_jax.engine.request import Request
from fairkv_jax.plan import Profile, make_plan
from fairkv_jax.replay import open_log, replay
from tests.engine.drive import (
    check_idle,
    check_owners,
    greedy,
    random_prompt,
    run,
    tiny_cache_bytes,
)

DOCUMENT = random_prompt(150, seed=1)
QUESTIONS = [random_prompt(5 + 4 * i, seed=20 + i) for i in range(10)]
COMPRESSED = {"kv_policy": "streaming_llm", "kv_budget": 40}
OPTIONS: dict[str, Any] = {
    "max_model_len": 256,
    "max_num_seqs": 4,
    "prefill_chunk_size": 16,
    "enable_prefix_caching": True,
    "progress": False,
}


def make_llm(checkpoint: Path, num_devices: int = 1, **options: Any) -> LLM:
    """With as many replicas of heads as fit, so that rows are routed differently."""
    tokens = ((100.0, 30.0, 20.0), (15.0, 25.0, 90.0))
    profile = Profile(model="", policy="ada_snapkv", budget=50, tokens=tokens)
    plan = make_plan(profile, num_devices, "fair_copying")
    options = OPTIONS | {"tensor_parallel_size": num_devices, "head_plan": plan} | options
    return LLM(model=checkpoint, **options)


@pytest.fixture(scope="module")
def llm(tiny_checkpoint: Path) -> LLM:
    return make_llm(tiny_checkpoint)


def tokens_of(llm: LLM, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    outputs = llm.generate(prompts, greedy(12), **options)
    return [output.outputs[0].token_ids for output in outputs]


def check_only_prefixes_left(llm: LLM) -> None:
    """Nothing runs, and the pages in use are those of prefixes."""
    scheduler = llm.engine.scheduler
    assert not llm.engine.has_unfinished_requests()
    assert not scheduler.kv_cache.lengths.any()
    assert not any(prefix.users for prefix in scheduler.prefixes)
    np.testing.assert_array_equal(scheduler.kv_cache.used_pages, scheduler.prefixes.num_pages)


@pytest.mark.parametrize(
    "num_devices", [*(pytest.param(n, marks=pytest.mark.long) for n in (1, 2)), 3]
)
def test_a_prefix_kept_whole_changes_no_token(tiny_checkpoint: Path, num_devices: int):
    llm = make_llm(tiny_checkpoint, num_devices)
    whole = tokens_of(llm, [[*DOCUMENT, *question] for question in QUESTIONS[:4]])
    check_idle(llm.engine)
    prefix = llm.cache_prefix(DOCUMENT)
    assert prefix.num_tokens == len(DOCUMENT)
    assert (prefix.kept_tokens == len(DOCUMENT)).all()
    assert tokens_of(llm, QUESTIONS[:4], prefix_id=prefix.id) == whole
    check_only_prefixes_left(llm)


@pytest.mark.parametrize("dtype", ["auto", "int8"])
def test_copies_on_other_devices_change_no_token(tiny_checkpoint: Path, dtype: str):
    """Rows that run at the same time are served by the copies, rows that run alone are not."""
    llm = make_llm(tiny_checkpoint, 2, kv_cache_dtype=dtype)
    prefix = llm.cache_prefix(DOCUMENT, **COMPRESSED)
    alone = [tokens_of(llm, [question], prefix_id=prefix.id)[0] for question in QUESTIONS[:8]]
    (cached,) = llm.engine.scheduler.prefixes
    assert not cached.copies
    llm.engine.warm_up([1], 4, suffix_lengths=range(1, 60))
    compiled = llm.engine.stats().compilations
    assert tokens_of(llm, QUESTIONS[:8], prefix_id=prefix.id) == alone
    assert cached.copies
    assert llm.engine.stats().compilations == compiled
    stats = llm.engine.stats().prefixes
    assert stats is not None
    assert 0 < stats.copied_bytes < stats.bytes
    llm.delete_prefix(prefix.id)
    check_idle(llm.engine)


@pytest.mark.parametrize("num_devices", [1, 3])
def test_a_document_is_read_once(tiny_checkpoint: Path, num_devices: int):
    """Answers are those of asking each question of a document that was compressed for it alone."""
    llm = make_llm(tiny_checkpoint, num_devices)
    apart = []
    for question in QUESTIONS:
        prefix = llm.cache_prefix(DOCUMENT, **COMPRESSED)
        apart += tokens_of(llm, [question], prefix_id=prefix.id)
        llm.delete_prefix(prefix.id)
        check_idle(llm.engine)
    prefix = llm.cache_prefix(DOCUMENT, **COMPRESSED)
    assert (prefix.kept_tokens == 40).all()
    outputs = llm.generate(QUESTIONS, greedy(12), prefix_id=prefix.id)
    assert [output.outputs[0].token_ids for output in outputs] == apart
    assert {output.num_cached_tokens for output in outputs} == {len(DOCUMENT)}
    for output, question in zip(outputs, QUESTIONS, strict=True):
        assert output.prompt_token_ids == [*DOCUMENT, *question]
        assert output.kv_lengths is not None
        assert (output.kv_lengths == 40 + len(question)).all()
    check_only_prefixes_left(llm)


def test_only_the_question_is_prefilled(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    prefix = llm.cache_prefix(DOCUMENT, **COMPRESSED)
    lengths, start = [], llm.engine.runner.start_prefill

    def counted(request: Any, *args: Any, **options: Any) -> Any:
        lengths.append(len(request.prompt_token_ids))
        return start(request, *args, **options)

    monkeypatch.setattr(llm.engine.runner, "start_prefill", counted)
    tokens_of(llm, QUESTIONS, prefix_id=prefix.id)
    assert lengths == [len(question) for question in QUESTIONS]
    assert llm.cache_prefix(DOCUMENT, **COMPRESSED).id == prefix.id
    assert len(lengths) == len(QUESTIONS)
    assert [each.id for each in llm.prefixes()] == [prefix.id]
    llm.delete_prefix(prefix.id)
    check_idle(llm.engine)


def test_rows_share_the_pages_of_a_prefix(llm: LLM):
    """All full pages; the page that a row appends to is its own."""
    engine, page = llm.engine, llm.engine.runner.cache_spec.page_size
    prefix = llm.cache_prefix(DOCUMENT)
    before = engine.scheduler.kv_cache.used_pages.sum()
    assert before == prefix.kept_tokens.size * -(-len(DOCUMENT) // page)
    for i in range(4):
        engine.add_request(Request(str(i), [5], greedy(60), prefix_id=prefix.id))
    while len(engine.scheduler.running) < 4:
        engine.step()
    engine.step()
    check_owners(engine)
    lengths = engine.scheduler.kv_cache.lengths
    num_full = np.count_nonzero(lengths) * (len(DOCUMENT) // page)
    own = (-(-lengths // page)).sum() - num_full
    assert engine.scheduler.kv_cache.used_pages.sum() == before + own
    run(engine)
    llm.delete_prefix(prefix.id)
    check_idle(engine)


def test_a_prefix_that_is_deleted_serves_those_that_use_it(llm: LLM):
    engine = llm.engine
    prefix = llm.cache_prefix(DOCUMENT, **COMPRESSED)
    expected = tokens_of(llm, QUESTIONS[:1], prefix_id=prefix.id)
    engine.add_request(Request("a", QUESTIONS[0], greedy(12), prefix_id=prefix.id))
    while not engine.scheduler.running:
        engine.step()
    llm.delete_prefix(prefix.id)
    assert llm.prefixes() == []
    with pytest.raises(ValueError, match="there is no prefix"):
        llm.generate([[5]], prefix_id=prefix.id)
    (output,) = run(engine).values()
    assert [output.outputs[0].token_ids] == expected
    check_idle(engine)


def test_pressure_evicts_and_preempts_and_changes_no_token(tiny_checkpoint: Path):
    """Documents and rows do not fit together; whatever has to go is computed again."""
    roomy = make_llm(tiny_checkpoint)
    num_pages = 3 * 2 * 16 + 20  # of one request of full length, and a few
    tight = make_llm(
        tiny_checkpoint,
        kv_cache_memory_bytes=tiny_cache_bytes(num_pages, 4, 256),
        prefix_cache_fraction=1.0,
    )
    results = []
    for llm in (roomy, tight):
        ids = [
            llm.cache_prefix(random_prompt(100 + 10 * i, seed=i), **COMPRESSED).id for i in range(4)
        ]
        requests = [
            Request(f"{i} {j}", QUESTIONS[i], greedy(40), prefix_id=ids[(i + j) % 4])
            for i in range(4)
            for j in range(3)
        ]
        outputs = run(llm.engine, requests, check_owners)
        results.append({name: out.outputs[0].token_ids for name, out in outputs.items()})
        check_only_prefixes_left(llm)
    assert results[0] == results[1]
    assert tight.engine.scheduler.num_preemptions > 0
    assert sum(each.prefix.pages is not None for each in tight.engine.prefixes.of_owner()) < 4


def test_equal_prefixes_that_come_at_once_are_computed_once(llm: LLM):
    engine = llm.engine
    for name in "ab":
        engine.add_request(Request(name, DOCUMENT, caches_prefix=True))
    outputs = run(engine)
    assert {name: out.num_cached_tokens for name, out in outputs.items()} == {
        "a": 0,
        "b": len(DOCUMENT),
    }
    (prefix,) = llm.prefixes()
    llm.delete_prefix(prefix.id)
    check_idle(engine)


def test_nothing_compiles_after_the_warm_up(tiny_checkpoint: Path):
    llm = make_llm(tiny_checkpoint, kv_suffix="compress", kv_policy="ada_snapkv", kv_budget=48)
    engine = llm.engine
    engine.warm_up(range(1, 256), 4, suffix_lengths=range(1, 256))
    before = engine.stats().compilations
    ids = [
        llm.cache_prefix(random_prompt(n, seed=n), kv_policy="streaming_llm", kv_budget=30).id
        for n in (10, 33, 200)
    ]
    for i, prefix_id in enumerate(ids):
        tokens_of(llm, QUESTIONS[i : i + 5], prefix_id=prefix_id)
        llm.delete_prefix(prefix_id)
    assert engine.stats().compilations == before
    check_idle(engine)


def test_a_suffix_may_be_compressed(tiny_checkpoint: Path):
    llm = make_llm(tiny_checkpoint, kv_suffix="compress", **COMPRESSED)
    prefix = llm.cache_prefix(DOCUMENT)
    (output,) = llm.generate([random_prompt(70)], greedy(3), prefix_id=prefix.id)
    assert output.kv_lengths is not None
    assert (output.kv_lengths == 80).all()


def test_a_conversation_goes_on_from_its_messages(llm: LLM):
    system = [{"role": "system", "content": "the wall and the inn"}]
    question = [{"role": "user", "content": "and then?"}]
    (expected,) = llm.chat([*system, *question], greedy(8))
    prefix = llm.cache_prefix(system)
    (output,) = llm.chat(question, greedy(8), prefix_id=prefix.id)
    assert output.prompt_token_ids == expected.prompt_token_ids
    assert output.outputs[0].token_ids == expected.outputs[0].token_ids
    assert output.num_cached_tokens == prefix.num_tokens
    llm.delete_prefix(prefix.id)


def test_a_text_is_not_taken_for_a_conversation(llm: LLM):
    """The same tokens, cached as messages and as a text, are continued differently."""
    messages = [{"role": "user", "content": "and then?"}]
    tokens = llm.get_tokenizer().encode(
        llm.get_tokenizer().apply_chat_template(messages, add_generation_prompt=False),
        add_special_tokens=False,
    )
    of_messages, of_tokens = llm.cache_prefix(messages), llm.cache_prefix(tokens)
    assert of_messages.id != of_tokens.id
    for prefix in (of_messages, of_tokens):
        llm.delete_prefix(prefix.id)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prefix_id": "nobody"}, "there is no prefix 'nobody'"),
        ({"prefix_id": "known", "prompt": []}, "the prompt is empty"),
        ({"prefix_id": "known", "prompt": [5] * 120}, "the prompt has 270 tokens"),
        (
            {"prefix_id": "known", "params": SamplingParams(prompt_logprobs=1)},
            "leave out prefix_id",
        ),
        ({"prefix_id": "known", "return_kept_positions": True}, "leave out prefix_id"),
        ({"prefix_id": "known", "kv_budget": 40}, "have no effect on it"),
        ({"caches_prefix": True, "prompt": [2**70]}, "not in the vocabulary"),
        ({"caches_prefix": True, "return_kept_positions": True}, "do not ask for them"),
    ],
)
def test_bad_prefixes_are_refused(llm: LLM, options: dict[str, Any], said: str):
    prefix = llm.cache_prefix(DOCUMENT)
    options = {"prompt": [5], "params": greedy(1)} | options
    if options.get("prefix_id") == "known":
        options["prefix_id"] = prefix.id
    prompt, params = options.pop("prompt"), options.pop("params")
    with pytest.raises(ValueError, match=said):
        llm.engine.validate(Request("a", prompt, params, **options))
    llm.delete_prefix(prefix.id)
    check_idle(llm.engine)


@pytest.mark.parametrize("prompt", [[], ["a", "b"], [[5], [6]]])
def test_one_prefix_is_cached_at_a_time(llm: LLM, prompt: Any):
    with pytest.raises(ValueError, match=f"one text, .* got {len(prompt)}"):
        llm.cache_prefix(prompt)


def test_methods_that_look_at_the_end_share_only_what_they_keep_whole(tiny_checkpoint: Path):
    llm = make_llm(tiny_checkpoint, kv_policy="ada_snapkv", kv_budget=64)
    with pytest.raises(ValueError, match="a head may keep 64: use kv_policy streaming_llm for it"):
        llm.cache_prefix(DOCUMENT)
    assert llm.cache_prefix(DOCUMENT[:64]).num_tokens == 64


def test_prefixes_are_not_cached_unless_asked_for(tiny_checkpoint: Path):
    llm = make_llm(tiny_checkpoint, enable_prefix_caching=False)
    with pytest.raises(ValueError, match="start with enable_prefix_caching"):
        llm.cache_prefix(DOCUMENT)


@pytest.mark.parametrize("has_prompts", [True, False])
def test_a_log_with_prefixes_is_replayed(
    tiny_checkpoint: Path, tmp_path: Path, *, has_prompts: bool
):
    path = tmp_path / "schedule.jsonl"
    llm = make_llm(tiny_checkpoint, 2, schedule_log=path, schedule_log_prompts=has_prompts)
    prefix = llm.cache_prefix(DOCUMENT, **COMPRESSED)
    answers = tokens_of(llm, QUESTIONS[:8], prefix_id=prefix.id)
    llm.engine.close()
    logged = path.read_text(encoding="utf-8")
    assert "PageReplication" in logged
    assert (str(DOCUMENT[:20])[1:-1].replace(" ", "") in logged) == has_prompts
    counts = replay(*open_log(path))
    assert counts.num_tokens == (sum(map(len, answers)) if has_prompts else 0)
