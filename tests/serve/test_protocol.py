"""What a body means to the engine."""

import json
from typing import Any

import pytest

from fairkv_jax.sampling_params import SamplingParams, StructuredOutputsParams
from fairkv_jax.serve.protocol import ChatBody, CompletionBody

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
COMPACT = {"x-guidance": {"whitespace_flexible": False}}
CLOSED = {**COMPACT, **SCHEMA, "additionalProperties": False}
ANY_OBJECT = {**COMPACT, "type": "object"}
OPEN = {**SCHEMA, "additionalProperties": True}


def json_format(**fields: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "a", **fields}}}


def completion(**fields: Any) -> SamplingParams:
    return CompletionBody.model_validate({"prompt": "x", **fields}).sampling_params()


def test_every_option_reaches_the_engine_under_its_name():
    fields = {
        "max_tokens": 30,
        "min_tokens": 4,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 1.0,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.2,
        "seed": 5,
        "stop": ["a"],
        "stop_token_ids": [9],
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "prompt_logprobs": 2,
        "logprobs": 3,
    }
    assert completion(**fields) == SamplingParams(**fields)
    bias = completion(logit_bias={"5": -100, "300": 2.5}).logit_bias
    assert bias == ((5, -100.0), (300, 2.5))
    assert completion() == SamplingParams()


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, {"json": ANY_OBJECT}),
        (json_format(schema=SCHEMA), {"json": CLOSED}),
        (json_format(schema=SCHEMA, strict=True), {"json": CLOSED}),
        (json_format(schema=SCHEMA, strict=False), {"json": {**COMPACT, **SCHEMA}}),
        (json_format(schema=OPEN), {"json": {**COMPACT, **OPEN}}),
        (json_format(schema={"properties": 5}), {"json": {"properties": 5}}),
        ({"guided_json": SCHEMA}, {"json": CLOSED}),
        ({"guided_json": json.dumps(SCHEMA)}, {"json": CLOSED}),
        ({"guided_json": "true"}, {"json": "true"}),
        ({"guided_json": "{"}, {"json": "{"}),
        ({"guided_regex": "a+"}, {"regex": "a+"}),
        ({"guided_choice": ["a", "b"]}, {"choice": ["a", "b"]}),
        ({"guided_grammar": 'start: "a"'}, {"grammar": 'start: "a"'}),
        ({"structured_outputs": {"json": SCHEMA}}, {"json": CLOSED}),
        ({"structured_outputs": {"json_object": True}}, {"json": ANY_OBJECT}),
        (
            {"structured_outputs": {"json": SCHEMA, "disable_additional_properties": False}},
            {"json": {**COMPACT, **SCHEMA}},
        ),
        (
            {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": False}},
            {"json": {**SCHEMA, "additionalProperties": False}},
        ),
        (
            {"structured_outputs": {"json_object": True, "disable_any_whitespace": False}},
            {"json": {"type": "object"}},
        ),
        (
            {"structured_outputs": {"choice": ["a"]}, "response_format": {"type": "text"}},
            {"choice": ["a"]},
        ),
    ],
)
def test_all_ways_to_say_what_an_output_must_match(
    fields: dict[str, Any], wanted: dict[str, Any] | None
):
    expected = None if wanted is None else StructuredOutputsParams(**wanted)
    assert completion(**fields).structured_outputs == expected
    chat = ChatBody.model_validate({"messages": [{"role": "user", "content": "x"}], **fields})
    assert chat.sampling_params().structured_outputs == expected


def test_echo_wants_the_prompts_log_probabilities_only_with_logprobs():
    assert completion(echo=True).prompt_logprobs is None
    assert completion(echo=True, logprobs=0).prompt_logprobs == 0
    assert completion(echo=True, logprobs=3).prompt_logprobs == 3
    assert completion(echo=True, logprobs=3, prompt_logprobs=1).prompt_logprobs == 3
    assert completion(logprobs=3).prompt_logprobs is None
    assert completion(echo=True, max_tokens=0, logprobs=1).max_tokens == 0
