"""Options out of their limits: each message names the option, the value and the limit."""

import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from fairkv_jax.config import BuildOptions, EngineConfig, KVConfig, ModelConfig
from fairkv_jax.sampling_params import SamplingParams, StructuredOutputsParams


def test_it_imports_no_jax():
    code = (
        "import sys, fairkv_jax.command_line, fairkv_jax.config, fairkv_jax.sampling_params; "
        "assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 64}, "kv_policy 'full' takes neither kv_budget nor kv_ratio: drop them"),
        ({"policy": "snapkv"}, "needs either kv_budget or kv_ratio, got kv_budget=None"),
        ({"policy": "snapkv", "budget": 64, "ratio": 0.5}, "kv_budget=64 and kv_ratio=0.5"),
        ({"policy": "snapkv", "budget": 0}, "kv_budget must be an integer of at least 1, got 0"),
        ({"policy": "snapkv", "budget": 64.0}, "kv_budget must be an integer .* got 64.0"),
        ({"policy": "snapkv", "budget": True}, "kv_budget must be an integer .* got True"),
        ({"policy": "snapkv", "budget": "64"}, "kv_budget must be an integer .* got '64'"),
        ({"policy": "snapkv", "ratio": 1.0}, r"kv_ratio must lie in \[0, 1\), got 1.0"),
        ({"policy": "snapkv", "ratio": -0.1}, r"kv_ratio must lie in \[0, 1\), got -0.1"),
        ({"policy": "snapkv", "ratio": math.nan}, r"kv_ratio must lie in \[0, 1\), got nan"),
        ({"window": 0}, "kv_window must be an integer of at least 1, got 0"),
        ({"kernel": 4}, "kv_kernel must be odd, got 4: use 5"),
        ({"kernel": -1}, "kv_kernel must be an integer of at least 1, got -1"),
        ({"pooling": "sum"}, "kv_pooling must be one of max, avg, got 'sum'"),
        ({"safeguard": "none"}, "kv_safeguard must be one of blend, reserve, got 'none'"),
        ({"alpha_safeguard": 1.1}, r"kv_alpha_safeguard must lie in \[0, 1\], got 1.1"),
        ({"alpha_safeguard": math.nan}, r"kv_alpha_safeguard must lie in \[0, 1\], got nan"),
        ({"alpha_safeguard": "0.2"}, r"kv_alpha_safeguard must lie in \[0, 1\], got '0.2'"),
    ],
)
def test_kv_options(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        KVConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel_size": 0}, "tensor_parallel_size must be an integer of at least 1"),
        ({"max_num_seqs": -1}, "max_num_seqs must be an integer of at least 1, got -1"),
        ({"max_model_len": 1.5}, r"max_model_len must be an integer of at least \d, got 1.5"),
        ({"prefill_chunk_size": 0}, "prefill_chunk_size must be an integer of at least 1, got 0"),
        ({"kv_cache_bytes": 0}, "must be an integer of at least 1, got 0"),
        ({"page_size": 12}, "page_size must be a multiple of 8, got 12"),
        ({"quantization": "int4"}, "quantization must be one of int8, got 'int4'"),
        ({"page_size": 4}, "page_size must be an integer of at least 8, got 4"),
    ],
)
def test_engine_options(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        EngineConfig(**options)


@pytest.mark.parametrize("value", [0, 1.5, math.nan, True, "0.9"])
def test_build_options(value: Any):
    with pytest.raises(ValueError, match=r"gpu_memory_utilization must lie in \(0, 1\], got "):
        BuildOptions(gpu_memory_utilization=value)


@pytest.mark.parametrize(
    ("config", "old", "new", "value"),
    [
        (KVConfig, "pool", "pooling", "avg"),
        (KVConfig, "floor", "safeguard", "reserve"),
        (KVConfig, "alpha", "alpha_safeguard", 0.5),
        (EngineConfig, "prefill_block", "prefill_chunk_size", 64),
        (BuildOptions, "max_copies", "max_extra_replicas", 3),
    ],
)
def test_deprecated_fields(config: type, old: str, new: str, value: Any):
    with pytest.warns(DeprecationWarning, match=f"{old} is deprecated .*: use {new}") as caught:
        assert config(**{old: value}) == config(**{new: value}) != config()
    assert caught[0].filename == __file__
    with pytest.raises(ValueError, match=f"{old} is the deprecated name of {new}: give {new} only"):
        config(**{old: value, new: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": math.nan}, "temperature must be a finite number at least 0, got nan"),
        ({"temperature": math.inf}, "temperature must be a finite number at least 0, got inf"),
        ({"temperature": -1}, "temperature must be a finite number at least 0, got -1"),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"temperature": None}, "temperature must be a number, got None"),
        ({"top_p": 0}, "top_p must be a finite number above 0 and at most 1, got 0"),
        ({"top_p": 1.5}, "top_p must be .* at most 1, got 1.5"),
        ({"min_p": -0.1}, "min_p must be .* at least 0 and at most 1, got -0.1"),
        ({"top_k": -2}, "top_k must be at least -1, got -2"),
        ({"top_k": 2.0}, "top_k must be an integer, got 2.0"),
        ({"max_tokens": -1}, "max_tokens must be at least 0, got -1"),
        ({"max_tokens": True}, "max_tokens must be an integer, got True"),
        ({"seed": 2**64}, "seed must be between"),
        ({"seed": "x"}, "seed must be an integer, got 'x'"),
        ({"logprobs": 21}, "logprobs must be between 0 and 20, got 21"),
        ({"logprobs": -1}, "logprobs must be between 0 and 20, got -1"),
        ({"stop": ""}, "stop must be non-empty strings"),
        ({"stop": ["a", 3]}, "stop must be non-empty strings"),
        ({"stop_token_ids": [-1]}, "stop_token_ids must be at least 0, got -1"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids must be an integer, got 'a'"),
        ({"stop_token_ids": [1] * 129}, "stop_token_ids takes at most 128 ids, got 129"),
        ({"min_tokens": -1}, "min_tokens must be at least 0, got -1"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens must be at most max_tokens 4, got 5"),
        ({"presence_penalty": 2.1}, "presence_penalty must be .* at most 2, got 2.1"),
        ({"frequency_penalty": -2.1}, "frequency_penalty must be .* at least -2 .*, got -2.1"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a finite number above 0, got 0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty must be .*, got inf"),
        ({"logit_bias": [3]}, "logit_bias must map token ids to numbers"),
        ({"logit_bias": {"3": 1.0}}, "a token id in logit_bias must be an integer, got '3'"),
        ({"logit_bias": {-3: 1.0}}, "a token id in logit_bias must be at least 0, got -3"),
        ({"logit_bias": {3: 101}}, "logit_bias of token 3 must be .* at most 100, got 101"),
        ({"logit_bias": {3: math.nan}}, "logit_bias of token 3 must be a finite number"),
        ({"logit_bias": dict.fromkeys(range(301), 1)}, "at most 300 tokens, got 301"),
        ({"prompt_logprobs": 21}, "prompt_logprobs must be between 0 and 20, got 21"),
        ({"structured_outputs": "[a-z]"}, "structured_outputs must be StructuredOutputsParams"),
    ],
)
def test_sampling_options(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of json, regex, choice, grammar, json_object .*, got none"),
        ({"json_object": False}, "got none"),
        ({"json": {}, "regex": "a"}, "got json, regex"),
        ({"json": ["type"]}, "json must be a string, got"),
        ({"regex": 5}, "regex must be a string, got 5"),
        ({"grammar": b"start"}, "grammar must be a string"),
        ({"choice": "yes"}, "choice must be a list"),
        ({"choice": []}, "choice must be non-empty strings"),
        ({"choice": ["a", ""]}, "choice must be non-empty strings"),
        ({"json_object": "yes"}, "json_object must be True or False"),
        ({"regex": "a" * 131073}, "regex takes at most 131072 characters, got 131073"),
        ({"choice": ["ab"] * 65537}, "choice takes at most 131072 characters, got 131074"),
    ],
)
def test_structured_outputs(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        StructuredOutputsParams(**options)


@pytest.mark.parametrize("options", [{"stop": 5}, {"stop_token_ids": 5}])
def test_sampling_options_that_are_no_lists(options: dict[str, Any]):
    with pytest.raises(ValueError, match=next(iter(options))):
        SamplingParams(**options)


def test_sampling_params_are_values():
    params = SamplingParams(stop="a", stop_token_ids=[3])
    assert (params.stop, params.stop_token_ids) == (("a",), (3,))
    assert hash(params) == hash(SamplingParams(stop=["a"], stop_token_ids=(3,)))
    guided = StructuredOutputsParams(json={"type": "integer"})
    params = SamplingParams(logit_bias={5: -1, 3: 2.5}, structured_outputs=guided)
    assert params.logit_bias == ((5, -1), (3, 2.5))
    assert hash(params) == hash(replace(params))
    assert guided == StructuredOutputsParams(json='{"type": "integer"}')


def test_query_heads_divide_over_kv_heads():
    sizes = dict.fromkeys(
        ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "head_dim"), 8
    )
    rest = {"max_position_embeddings": 64, "rope_theta": 1e4, "rms_norm_eps": 1e-5}
    with pytest.raises(ValueError, match="9 query heads do not divide over 4 KV heads"):
        ModelConfig("llama", num_heads=9, num_kv_heads=4, tie_word_embeddings=True, **sizes, **rest)
