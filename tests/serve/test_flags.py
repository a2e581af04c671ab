"""The server's command line: spellings, defaults, deprecated names, and error messages."""

from typing import Any

import pytest

from fairkv_jax.config import ENGINE_OPTIONS
from fairkv_jax.hosts.options import HOST_OPTIONS
from fairkv_jax.serve.flags import parse
from fairkv_jax.serve.options import SERVER_OPTIONS


def parsed(*arguments: str, **environ: str):
    return parse(arguments, environ)


def test_no_flag_is_needed_and_the_default_policy_compresses():
    options = parsed()
    assert options.engine["kv_policy"] == "ada_snapkv"
    assert options.engine["kv_budget"] == 1024
    assert options.engine["head_plan"] == "fair_copying"
    assert "model" not in options.engine
    assert options.cpu_devices == 2
    assert (options.server.host, options.server.port) == ("127.0.0.1", 8000)


def test_dashes_and_underscores_are_the_same():
    dashes = parsed("--tensor-parallel-size", "3", "--kv-pool-first", "--max-num-seqs=4")
    assert dashes == parsed("--tensor_parallel_size=3", "--kv_pool_first", "--max_num_seqs", "4")
    assert dashes.cpu_devices == 3
    assert dashes.engine["kv_pool_first"] is True


def test_values_keep_their_dashes():
    options = parsed("--served-model-name=a-b,c_d", "--model", "my-folder/a-model")
    assert options.server.served_model_names == ("a-b", "c_d")
    assert options.engine["model"] == "my-folder/a-model"


@pytest.mark.parametrize("off", ["--no-kv-pool-first", "--nokv_pool_first", "--no_kv_pool_first"])
def test_switches_turn_off(off: str):
    assert parsed("--kv-pool-first", off).engine["kv_pool_first"] is False


def test_full_and_ratio_have_no_default_budget():
    assert "kv_budget" not in parsed("--kv-policy=full").engine
    assert "kv_budget" not in parsed("--kv-ratio=0.5").engine


def test_keys_come_from_the_flag_and_the_environment():
    options = parsed("--api-key=a,b", FAIRKV_API_KEY="c")
    assert options.server.api_keys == ("a", "b", "c")
    assert parsed().server.api_keys == ()


@pytest.mark.parametrize("origins", ["a,b", "a, b", '["a","b"]', '["a", "b"]'])
def test_lists_are_written_with_commas_or_as_vllm_does(origins: str):
    assert parsed(f"--allowed-origins={origins}").server.allowed_origins == ("a", "b")
    assert parsed().server.allowed_origins == ()
    assert parsed().server.allowed_headers == ("*",)


def test_prompts_are_logged_only_on_request():
    assert parsed("--enable-log-requests").server.enable_log_requests
    assert not parsed("--no-enable-log-requests").server.enable_log_requests
    assert not parsed().server.enable_log_requests


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("--kv-budgett=3", "kv_budgett"),
        ("--kv-budget=many", "many"),
        ("--kv-pooling=median", "max|avg"),
        ("--quantization=int4", "int4"),
        ("--dtype=int8", "auto|float32|bfloat16|float16"),
        ("--kv-policy=h2o", "full|streaming_llm|snapkv"),
        ("--port=99999", "between 0 and 65535, got 99999"),
        ("--tensor-parallel-size=0", "at least 1, got 0"),
        ("--max-num-queued-reqs=-1", "at least 0, got -1"),
        ("--ssl-keyfile=key.pem", "--ssl-certfile must be given together"),
        ("--enable-auto-tool-choice", "needs --tool-call-parser, which is one of hermes, llama3"),
        ("--tool-call-parser=gpt", "hermes|llama3_json|mistral|pythonic"),
        ("--allowed-origins=[1]", "a list of strings, got [1]"),
        ("model.gguf", "unexpected argument 'model.gguf'"),
    ],
)
def test_wrong_arguments_end_with_a_sentence(argument: str, sentence: str):
    with pytest.raises(SystemExit) as stop:
        parsed(argument)
    assert sentence in str(stop.value)
    assert "--help" in str(stop.value)


@pytest.mark.parametrize(
    ("old", "new", "value"),
    [
        ("kv-pool", "kv-pooling", "avg"),
        ("kv-floor", "kv-safeguard", "reserve"),
        ("kv-alpha", "kv-alpha-safeguard", "0.5"),
        ("prefill-block", "prefill-chunk-size", "64"),
        ("max-copies", "max-extra-replicas", "3"),
    ],
)
def test_deprecated_names(old: str, new: str, value: str, caplog: pytest.LogCaptureFixture):
    for argument in ([f"--{old}={value}"], [f"--{old.replace('-', '_')}", value]):
        caplog.clear()
        options = parsed(*argument)
        assert f"--{old} is deprecated" in caplog.text
        assert f"use --{new}" in caplog.text
        caplog.clear()
        assert options == parsed(f"--{new}={value}") != parsed()
        assert not caplog.text
    with pytest.raises(SystemExit, match=f"--{old} is the deprecated name of --{new}: give --"):
        parsed(f"--{new}={value}", f"--{old}={value}")


def flag_value(kind: type, choices: tuple[str, ...]) -> Any:
    """Returns a value of that type that is no option's default."""
    return choices[-1] if choices else {str: "x", int: 7919, float: 0.25, tuple: ("x", "y")}[kind]


def test_every_declared_option_has_a_flag_that_reaches_its_destination():
    for option in (*ENGINE_OPTIONS, *SERVER_OPTIONS):
        if option.type is bool:
            value, arguments = True, [f"--{option.name}"]
        else:
            value = flag_value(option.type, option.choices)
            text = ",".join(value) if option.type is tuple else value
            arguments = [f"--{option.name}={text}"]
        if option.name.startswith("ssl_"):
            arguments = ["--ssl-keyfile=x", "--ssl-certfile=x"]
        if option.name == "enable_auto_tool_choice":
            arguments.append("--tool-call-parser=hermes")
        options = parsed(*arguments)
        if option in ENGINE_OPTIONS:
            assert options.engine[option.name] == value
        else:
            assert getattr(options.server, option.field) == value


def test_help_lists_every_option_with_its_default(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        parsed("--help")
    assert stop.value.code == 0
    page = capsys.readouterr().out
    assert max(map(len, page.splitlines())) <= 100
    entries = [" ".join(entry.split()) for entry in page.split("\n  --")[1:]]
    by_name = {entry.split()[0]: entry for entry in entries}
    options = (*ENGINE_OPTIONS, *HOST_OPTIONS, *SERVER_OPTIONS)
    assert len(by_name) == len(entries) == len(options)
    assert "Default: 0.2." in by_name["kv-alpha-safeguard"]
    assert "One of max, avg. Default: max." in by_name["kv-pooling"]
    assert "Default: ada_snapkv." in by_name["kv-policy"]
    assert "Default: all GPUs, or 2 devices on the CPU." in by_name["tensor-parallel-size"]
