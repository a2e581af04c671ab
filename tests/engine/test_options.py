"""Options of one request in a running engine: against NumPy, beside others, and preempted."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fairkv_jax import LLM, SamplingParams
from fairkv_jax.engine.execution import Execution
from fairkv_jax.engine.llm_engine import LLMEngine
from fairkv_jax.engine.request import Request
from fairkv_jax.engine.scheduler_output import SchedulerOutput
from fairkv_jax.sampling_params import StructuredOutputsParams
from tests.engine.drive import check_idle, greedy, random_prompt, request, run, tiny_cache_bytes
from tests.oracle.sampling import adjusted

EOS = (0, 2)
PROMPT = random_prompt(40, seed=4)
DIGITS = StructuredOutputsParams(regex="[0-9]{4}(-[0-9]{4}){3}")
PERSON = StructuredOutputsParams(
    json={
        "type": "object",
        "properties": {"age": {"enum": [7, 18, 64]}, "name": {"type": "string", "maxLength": 6}},
        "required": ["age", "name"],
        "additionalProperties": False,
        "x-guidance": {"whitespace_flexible": False},
    }
)


@pytest.fixture(scope="module")
def llm(tiny_checkpoint: Path) -> LLM:
    """Keeps everything, so that a prefill of prompt and output tells what the next token was."""
    return LLM(
        tiny_checkpoint,
        tensor_parallel_size=2,
        max_model_len=300,
        max_num_seqs=4,
        progress=False,
    )


@pytest.fixture
def engine(llm: LLM) -> Iterator[LLMEngine]:
    """Idle before and after every test."""
    check_idle(llm.engine)
    yield llm.engine
    check_idle(llm.engine)


OPTIONS: list[dict[str, Any]] = [
    {"presence_penalty": 2.0, "frequency_penalty": 1.5},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6, "frequency_penalty": 0.5},
    {"logit_bias": {50: 6.0, 60: 7.0, 70: -100.0}, "frequency_penalty": 2.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_token_is_the_one_that_numpy_takes(
    llm: LLM, engine: LLMEngine, options: dict[str, Any]
):
    params = greedy(10, **options)
    chosen = llm.generate(PROMPT, params)[0].outputs[0].token_ids
    assert chosen != llm.generate(PROMPT, greedy(10))[0].outputs[0].token_ids
    for place, token in enumerate(chosen):
        logits = llm.prefill_logits(PROMPT + chosen[:place])
        assert adjusted(logits, params, PROMPT, chosen[:place], EOS).argmax() == token


def mixed_requests() -> list[Request]:
    """More than there are rows, each with options of its own."""
    cases: list[SamplingParams] = [
        greedy(30),
        *(greedy(20, **options) for options in OPTIONS),
        greedy(30, structured_outputs=DIGITS),
        SamplingParams(seed=3, max_tokens=60, structured_outputs=PERSON, logprobs=2),
        greedy(12, min_tokens=8, logit_bias=dict.fromkeys(EOS, 100.0), prompt_logprobs=1),
        SamplingParams(seed=5, max_tokens=25, frequency_penalty=1.0, top_k=20, ignore_eos=True),
        greedy(0, prompt_logprobs=3),
    ]
    return [
        request(str(i), random_prompt(8 + 5 * i, seed=i), params) for i, params in enumerate(cases)
    ]


def test_options_change_nobody_elses_output(engine: LLMEngine):
    """All side by side; each alone gives the same."""
    alone = {}
    for each in mixed_requests():
        alone |= run(engine, [each])
    together = run(engine, mixed_requests())
    assert len(together) == len(alone)
    for name, output in together.items():
        assert output.outputs[0].token_ids == alone[name].outputs[0].token_ids
        assert output.outputs[0].finish_reason == alone[name].outputs[0].finish_reason


def test_preemption_changes_no_output(
    tiny_checkpoint: Path, engine: LLMEngine, monkeypatch: pytest.MonkeyPatch
):
    """Pages for little more than one request; penalties and grammars go on where they were."""
    long_digits = StructuredOutputsParams(regex="[0-9]{4}(-[0-9]{4}){16}")
    requests = [
        request("biased", random_prompt(20, 2), greedy(90, frequency_penalty=1.0)),
        request("digits", random_prompt(25, 1), greedy(90, structured_outputs=long_digits)),
        request("repeating", random_prompt(30, 4), greedy(90, repetition_penalty=1.3)),
        request("person", random_prompt(28, 3), greedy(60, structured_outputs=PERSON)),
    ]
    expected = run(engine, requests)
    one_row = 6 * (128 // 16)
    small = LLM(
        tiny_checkpoint,
        max_model_len=128,
        max_num_seqs=2,
        kv_cache_memory_bytes=tiny_cache_bytes(one_row + one_row // 8, 2, 128),
        progress=False,
    ).engine
    preempted = set()
    execute = small.runner.execute

    def watch(output: SchedulerOutput) -> Execution:
        preempted.update(output.preempted_request_ids)
        return execute(output)

    monkeypatch.setattr(small.runner, "execute", watch)
    outputs = run(small, requests)
    assert {"digits", "repeating"} & preempted
    for name, output in outputs.items():
        assert output.outputs[0].token_ids == expected[name].outputs[0].token_ids


@pytest.mark.parametrize("temperature", [0, 1.0, 5.0])
@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_grammar_ends_the_output_where_it_is_whole(
    llm: LLM, engine: LLMEngine, temperature: float, ignore_eos: bool
):
    params = SamplingParams(
        temperature=temperature,
        seed=1,
        max_tokens=100,
        ignore_eos=ignore_eos,
        structured_outputs=DIGITS,
    )
    output = llm.generate(PROMPT, params)[0].outputs[0]
    assert re.fullmatch("[0-9]{4}(-[0-9]{4}){3}", output.text)
    assert (output.finish_reason, output.stop_reason) == ("stop", None)


def test_schemas_hold_and_lengths_end_them_early(llm: LLM, engine: LLMEngine):
    def ask(seed: int, max_tokens: int):
        params = SamplingParams(seed=seed, max_tokens=max_tokens, structured_outputs=PERSON)
        return llm.generate(PROMPT, params)[0].outputs[0]

    outputs = [ask(seed, 60) for seed in range(6)]
    whole = [output for output in outputs if output.finish_reason == "stop"]
    assert whole
    for output in whole:
        person = json.loads(output.text)
        assert person["age"] in (7, 18, 64)
        assert len(person["name"]) <= 6
    short = ask(0, 3)
    assert short.finish_reason == "length"
    assert outputs[0].text.startswith(short.text)


def test_a_grammar_that_fails_on_the_way_ends_its_request_only(
    engine: LLMEngine,
):
    """As where it takes too much work; here the grammar is shown a token that it forbids."""
    other = request("other", PROMPT, greedy(20))
    expected = run(engine, [other])["other"].outputs[0].token_ids
    engine.add_request(request("failing", PROMPT, greedy(50, structured_outputs=DIGITS)))
    engine.add_request(other)
    while engine.scheduler.row_of("failing") is None:
        engine.step()
    matcher = engine.output_processor._states["failing"].matcher
    assert matcher is not None
    matcher.accept(EOS[0])
    outputs = run(engine)
    assert outputs["failing"].outputs[0].finish_reason == "error"
    assert outputs["other"].outputs[0].token_ids == expected


def test_nothing_ends_before_the_least_length(llm: LLM, engine: LLMEngine):
    """End of text, stop tokens and stop strings, all of them wanted at once."""
    wanted = {"temperature": 0, "max_tokens": 20, "logit_bias": {2: 100.0, 90: 60.0}}
    letter = llm.get_tokenizer().token_text(90)

    def ask(**options):
        return llm.generate(PROMPT, SamplingParams(**wanted, **options))[0].outputs[0]

    assert ask().token_ids == [2]
    assert ask(min_tokens=6).token_ids == [90] * 6 + [2]
    late = ask(min_tokens=6, stop_token_ids=[90])
    assert not {2, 90} & set(late.token_ids[:6])
    assert late.token_ids[6:] == [2]
    stopped = ask(min_tokens=6, stop=letter, ignore_eos=True)
    assert stopped.token_ids[:6] == [90] * 6
    assert stopped.text.startswith(letter * 6)


@pytest.mark.parametrize(("num_tokens", "count"), [(1, 4), (2, 4), (40, 0), (40, 4), (299, 1)])
def test_prompt_logprobs(llm: LLM, engine: LLMEngine, num_tokens: int, count: int):
    """Against the logits of prefills that end before each token; blocks of 128 in long prompts."""
    prompt = random_prompt(num_tokens, seed=8)
    (output,) = llm.generate([prompt], greedy(1, prompt_logprobs=count))
    assert len(output.outputs[0].token_ids) == 1
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == num_tokens
    assert output.prompt_logprobs[0] is None
    places = range(1, num_tokens) if num_tokens <= 40 else (1, 127, 128, 129, 200, 298)
    for place in (p for p in places if p < num_tokens):
        logits = llm.prefill_logits(prompt[:place]).astype(np.float64)
        want = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        got = output.prompt_logprobs[place]
        assert got is not None
        assert set(got) == {prompt[place], *np.argsort(-want)[:count].tolist()}
        for token, entry in got.items():
            assert entry.logprob == pytest.approx(want[token], abs=1e-3)
            assert entry.rank == 1 + (want > want[token]).sum()
            assert entry.decoded_token == llm.get_tokenizer().token_text(token)


def test_a_prompt_that_is_only_read(llm: LLM, engine: LLMEngine):
    """No token, no row, no page; the log-probabilities are those of a prompt that is continued."""
    (read,) = llm.generate([PROMPT], SamplingParams(max_tokens=0, prompt_logprobs=2))
    (continued,) = llm.generate([PROMPT], SamplingParams(max_tokens=3, prompt_logprobs=2))
    assert read.finished
    assert read.outputs[0].token_ids == []
    assert (read.outputs[0].text, read.outputs[0].finish_reason) == ("", "length")
    assert read.prompt_logprobs == continued.prompt_logprobs
    assert read.kv_lengths is not None
    (plain,) = llm.generate([PROMPT], SamplingParams(max_tokens=3))
    assert plain.prompt_logprobs is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"logit_bias": {384: 1.0}},
            r"token id 384 in logit_bias is not in the vocabulary \[0, 384",
        ),
        ({"min_tokens": 1, "stop_token_ids": list(range(5, 133))}, "at most 128 .* got 130"),
        ({"structured_outputs": StructuredOutputsParams(regex="[")}, "unclosed"),
    ],
)
def test_options_that_this_model_cannot_have(llm: LLM, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        llm.generate(PROMPT, SamplingParams(**options))
