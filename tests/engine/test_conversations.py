"""Conversations whose beginning is cached: every turn reads only what is new."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fairkv_jax import LLM, SamplingParams
from fairkv_jax.engine.conversation import chat_prompt
from fairkv_jax.engine.request import Request, RequestOutput
from fairkv_jax.sampling_params import StructuredOutputsParams
from tests.engine.drive import check_idle, check_owners, run

SYSTEM = {"role": "system", "content": "the wall and the inn and the well on the hill " * 2}
QUESTION = {"role": "user", "content": "and then? what of the wall in the end, and the other ones?"}
EPHEMERAL = {"cache_control": {"type": "ephemeral"}}
COMPRESSED = {"kv_policy": "streaming_llm", "kv_ratio": 0.6}
OPTIONS: dict[str, Any] = {
    "max_model_len": 512,
    "max_num_seqs": 4,
    "prefill_chunk_size": 32,
    "enable_prefix_caching": True,
    "prefix_min_tokens": 16,
    "progress": False,
}


WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "kept": COMPRESSED | {"tensor_parallel_size": 2},
    "compressed": COMPRESSED | {"kv_suffix": "compress"},
    "by question": {"kv_policy": "ada_snapkv", "kv_ratio": 0.6, "kv_window": 8},
}
"""How segments are kept."""


@pytest.fixture(scope="module")
def make(tiny_checkpoint: Path) -> Callable[[str], LLM]:
    """Returns one engine for each of `WAYS`."""
    return cache(lambda name: LLM(model=tiny_checkpoint, **OPTIONS | WAYS[name]))


@pytest.fixture
def llm(make: Callable[[str], LLM]) -> LLM:
    return make("kept")


def letters(count: int, **options: Any) -> SamplingParams:
    """Greedy decoding of letters that no merge of the tokenizer joins: the text says the tokens."""
    grammar = StructuredOutputsParams(regex=f"[bcdfgjkmpqsuvxyz]{{{count}}}")
    return SamplingParams(
        **{"temperature": 0, "max_tokens": count, "structured_outputs": grammar} | options
    )


def forget(llm: LLM) -> None:
    llm.engine.scheduler.prefixes.clear()
    check_idle(llm.engine)


def ask(llm: LLM, messages: list[Any], count: int = 40, **options: Any) -> RequestOutput:
    (output,) = llm.chat(messages, letters(count), **options)
    return output


def answered(output: RequestOutput) -> dict[str, str]:
    return {"role": "assistant", "content": output.outputs[0].text}


def prompt_of(llm: LLM, messages: list[Any]) -> Any:
    return chat_prompt(llm.engine.tokenizer, messages, divides=True)


@pytest.mark.parametrize("name", ["whole", "kept", "compressed"])
def test_every_turn_reads_only_what_is_new(
    make: Callable[[str], LLM], name: str, monkeypatch: pytest.MonkeyPatch
):
    """And answers as if everything had been read again."""
    llm = make(name)
    lengths, start = [], llm.engine.runner.start_prefill

    def counted(request: Any, *args: Any, **options: Any) -> Any:
        lengths.append(len(request.prompt_token_ids))
        return start(request, *args, **options)

    monkeypatch.setattr(llm.engine.runner, "start_prefill", counted)
    messages, cached = [SYSTEM, QUESTION], 0
    for _ in range(3):
        lengths.clear()
        output = ask(llm, messages)
        prompt = prompt_of(llm, messages)
        assert output.prompt_token_ids == prompt.token_ids
        assert output.num_cached_tokens == cached
        assert sum(lengths) == len(prompt.token_ids) - cached
        cached = len(prompt.token_ids) + 40 - 1  # but for the last token of the answer
        forget(llm)
        again = ask(llm, messages)
        assert again.num_cached_tokens == 0
        assert again.outputs[0].token_ids == output.outputs[0].token_ids
        messages = [*messages, answered(output), QUESTION]
    forget(llm)


def test_an_answer_in_the_cache_is_that_of_a_prompt_with_it(make: Callable[[str], LLM]):
    """Nothing is compressed, so the whole conversation as one prompt has the same answer."""
    llm = make("whole")
    messages = [SYSTEM, QUESTION]
    messages += [answered(ask(llm, messages)), QUESTION]
    output = ask(llm, messages)
    assert (output.num_cached_tokens or 0) > 40
    (whole,) = llm.generate([output.prompt_token_ids], letters(40))
    assert whole.num_cached_tokens == 0
    assert whole.outputs[0].token_ids == output.outputs[0].token_ids
    forget(llm)


def test_pages_of_turns_are_counted_once(llm: LLM):
    """Prefixes of one conversation hold the same pages, and the longest is evicted first."""
    messages = [SYSTEM, QUESTION]
    for _ in range(2):
        messages += [answered(ask(llm, messages)), QUESTION]
    scheduler = llm.engine.scheduler
    used = scheduler.kv_cache.used_pages.tolist()
    assert scheduler.prefixes.num_pages.tolist() == used
    lengths = [prefix.num_tokens for prefix in scheduler.prefixes]
    assert len(lengths) > 3
    assert lengths == sorted(lengths, reverse=True)
    while len(scheduler.prefixes) > 1:
        scheduler.prefixes.evict_unused()
        assert scheduler.kv_cache.used_pages.tolist() == scheduler.prefixes.num_pages.tolist()
    output = ask(llm, messages)
    assert output.num_cached_tokens == min(lengths)
    forget(llm)


def test_an_answer_that_a_stop_string_ends_is_read_again(llm: LLM):
    """Its tokens are not those of the text; what comes before it is cached."""
    text = ask(llm, [SYSTEM, QUESTION]).outputs[0].text
    forget(llm)
    stopped = letters(40, stop=text[20:23])
    (output,) = llm.chat([SYSTEM, QUESTION], stopped)
    assert len(output.outputs[0].text) <= 20
    messages = [SYSTEM, QUESTION, answered(output), QUESTION]
    assert ask(llm, messages).num_cached_tokens == len(output.prompt_token_ids)
    forget(llm)


def test_two_requests_that_bring_the_same_beginning_compute_it_once(llm: LLM):
    engine = llm.engine
    for index, word in enumerate(("inn", "hill")):
        messages = [SYSTEM, {"role": "user", "content": f"{QUESTION['content']} {word}"}]
        prompt = prompt_of(llm, messages)
        engine.add_request(
            Request(str(index), prompt.token_ids, letters(5), boundaries=prompt.boundaries)
        )
    outputs = run(engine, after_step=check_owners)
    (system,) = [each.position for each in prompt_of(llm, [SYSTEM, QUESTION]).boundaries]
    assert [outputs[name].num_cached_tokens for name in "01"] == [0, system]
    forget(llm)


def test_owners_and_salts_share_nothing(llm: LLM):
    prompt = prompt_of(llm, [SYSTEM, QUESTION])
    cached = []
    for owner, salt in (("a", ""), ("b", ""), ("a", "x"), ("a", ""), ("b", ""), ("a", "x")):
        request = Request(
            "r",
            prompt.token_ids,
            letters(3),
            boundaries=prompt.boundaries,
            owner=owner,
            cache_salt=salt,
        )
        cached.append(run(llm.engine, [request])["r"].num_cached_tokens)
    assert cached[:3] == [0, 0, 0]
    assert min(cached[3:]) > 0
    forget(llm)


def test_a_mark_divides_a_message(llm: LLM):
    """The document is read once, whatever is asked; a message that is not marked is not divided."""
    document = "the wall and the inn " * 10
    cached = []
    for question in ("what?", "who is at the inn?"):
        parts = [
            {"type": "text", "text": document, **EPHEMERAL},
            {"type": "text", "text": question},
        ]
        output = ask(llm, [{"role": "user", "content": parts}], 3)
        plain = [{"role": "user", "content": f"{document}\n{question}"}]
        assert output.prompt == prompt_of(llm, plain).text
        assert not prompt_of(llm, plain).boundaries
        cached.append(output.num_cached_tokens)
    assert cached[0] == 0
    assert cached[1] > 100
    forget(llm)


def test_a_marked_message_is_compressed_at_its_end(llm: LLM):
    """Also where it follows another segment, which lets other suffixes be kept whole."""
    marked = {**QUESTION, **EPHEMERAL}
    kept = [ask(llm, [SYSTEM, message], 1).kv_lengths for message in (QUESTION, marked)]
    assert kept[0] is not None
    assert kept[1] is not None
    assert kept[1].sum() < 0.8 * kept[0].sum()
    forget(llm)


def test_short_segments_join_the_next(llm: LLM):
    short = {"role": "system", "content": "brief"}
    assert prompt_of(llm, [short, QUESTION]).boundaries
    ask(llm, [short, QUESTION], 3)
    (prefix,) = llm.engine.scheduler.prefixes  # behind the prompt, not behind the first message
    assert prefix.num_tokens == len(prompt_of(llm, [short, QUESTION]).token_ids)
    forget(llm)


def test_methods_that_look_at_the_question_share_only_what_is_whole(make: Callable[[str], LLM]):
    llm = make("by question")
    messages = [SYSTEM, QUESTION]
    messages += [answered(ask(llm, messages)), QUESTION]
    output = ask(llm, messages)
    assert output.num_cached_tokens == 0
    assert len(llm.engine.scheduler.prefixes) == 0
    with pytest.raises(ValueError, match="use kv_policy streaming_llm for it"):
        ask(llm, [{**SYSTEM, **EPHEMERAL}, QUESTION])
    output = ask(llm, messages, kv_policy="streaming_llm")
    assert len(llm.engine.scheduler.prefixes) > 0
    forget(llm)


def test_a_named_prefix_has_turns_of_its_own(llm: LLM):
    """They go when it is deleted."""
    prefix = llm.cache_prefix([SYSTEM])
    first = ask(llm, [QUESTION], prefix_id=prefix.id)
    messages = [QUESTION, answered(first), QUESTION]
    second = ask(llm, messages, prefix_id=prefix.id)
    assert second.num_cached_tokens == len(first.prompt_token_ids) + 40 - 1
    assert len(llm.engine.scheduler.prefixes) > 1
    llm.delete_prefix(prefix.id)
    check_idle(llm.engine)


def test_prompts_are_not_divided_where_their_logprobs_are_asked_for(llm: LLM):
    prompt = prompt_of(llm, [SYSTEM, QUESTION])
    params = letters(3, prompt_logprobs=1)
    valid = llm.engine.validate(
        Request("a", prompt.token_ids, params, boundaries=prompt.boundaries)
    )
    assert len(llm.engine.segments(valid)) == 1


def test_answers_are_the_same_whatever_is_evicted(llm: LLM, tiny_checkpoint: Path):
    """A cache too small for the conversations, which go on turn by turn at the same time."""
    tight = LLM(model=tiny_checkpoint, **OPTIONS | {"kv_cache_memory_bytes": 1 << 20}, **COMPRESSED)
    answers = []
    for each in (llm, tight):
        talks = [[{**SYSTEM, "content": f"{i} {SYSTEM['content']}"}, QUESTION] for i in range(6)]
        for _ in range(2):
            outputs = each.chat(talks, letters(40))
            for talk, output in zip(talks, outputs, strict=True):
                talk += [answered(output), QUESTION]
        answers.append(talks)
    assert answers[0] == answers[1]
    forget(llm)
