"""The command line: spellings, defaults, and sentences for what is wrong."""

import pytest

from fairkv_jax.serve.flags import parse


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
        ("--kv-pool=median", "max|avg"),
        ("--quantization=int4", "int4"),
        ("--port=99999", "between 0 and 65535, got 99999"),
        ("--tensor-parallel-size=0", "at least 1, got 0"),
        ("--max-num-queued-reqs=-1", "at least 0, got -1"),
        ("--ssl-keyfile=key.pem", "--ssl-certfile go together"),
        ("--allowed-origins=[1]", "a list of strings, got [1]"),
        ("model.gguf", "'model.gguf' is not understood"),
    ],
)
def test_wrong_arguments_end_with_a_sentence(argument: str, sentence: str):
    with pytest.raises(SystemExit) as stop:
        parsed(argument)
    assert sentence in str(stop.value)
    assert "--help" in str(stop.value)


def test_help_fits_a_page_and_names_defaults(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        parsed("--help")
    assert stop.value.code == 0
    page = capsys.readouterr().out.splitlines()
    assert len(page) < 50
    assert max(map(len, page)) <= 100
    assert any("--kv-alpha" in line and "[0.2]" in line for line in page)
