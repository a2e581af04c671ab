"""Hugging Face folders: the same model as the GGUF file they were written from, or an error."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from fairkv_jax.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from tests.oracle.tiny import write_tiny_checkpoint
from tests.oracle.tiny_hf import write_tiny_folder

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
TEXTS = ["the cat and 12 hats", "<|im_start|>user\nhé 漢字 😀<|im_end|>", ""]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    return write_tiny_checkpoint(folder / "tiny.gguf", tie_word_embeddings=False)


@pytest.fixture
def folder(gguf, tmp_path) -> Path:
    return write_tiny_folder(tmp_path / "Tiny-Llama", gguf)


def check_same(checkpoint: Checkpoint, expected: Checkpoint, dtype: type) -> None:
    assert checkpoint.names() == expected.names()
    for name in expected.names():
        actual = checkpoint.tensor(name)
        assert actual.dtype == dtype
        np.testing.assert_array_equal(actual, expected.tensor(name).astype(dtype), err_msg=name)


@pytest.mark.parametrize("num_parts", [1, 3])
@pytest.mark.parametrize(
    ("kind", "dtype"), [("F32", np.float32), ("F16", np.float16), ("BF16", ml_dtypes.bfloat16)]
)
def test_a_folder_is_the_model_of_the_gguf_file(gguf, tmp_path, kind, dtype, num_parts):
    folder = write_tiny_folder(tmp_path / "Tiny-Llama", gguf, dtype=kind, num_parts=num_parts)
    checkpoint, expected = open_checkpoint(folder), open_checkpoint(gguf)
    assert checkpoint.config == expected.config
    assert checkpoint.name == "Tiny-Llama"
    check_same(checkpoint, expected, dtype)
    assert checkpoint.stored("embed") == (kind, 384 * 48 * np.dtype(dtype).itemsize)


def test_tied_embeddings_ignore_a_second_copy(tmp_path, gguf):
    folder = write_tiny_folder(tmp_path / "tied", gguf, changes={"tie_word_embeddings": True})
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config.tie_word_embeddings
    assert "lm_head" not in checkpoint.names()


def test_the_tokenizer_is_that_of_the_gguf_file(folder, gguf):
    tokenizer, expected = open_checkpoint(folder).tokenizer(), open_checkpoint(gguf).tokenizer()
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == expected.encode(text)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages) == expected.apply_chat_template(messages)
    assert tokenizer.eos_token_ids == {0, 2}
    assert tokenizer.vocab_size == 384


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ eos_token }}{{ bos_token }}", "<|im_end|><|im_start|>"),
        ([{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}], "d"),
    ],
)
def test_chat_templates_of_the_configuration(folder, template, expected):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    chat = [{"role": "user", "content": "hi"}]
    assert open_checkpoint(folder).tokenizer().apply_chat_template(chat) == expected


def test_conversations_with_tools_have_a_template_of_their_own(folder):
    """By its name in the configuration, which saved tokenizers keep, or by its file."""
    path = folder / "tokenizer_config.json"
    templates = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": templates}))
    chat = [{"role": "user", "content": "hi"}]
    tool = {"type": "function", "function": {"name": "f"}}

    def rendered(folder):
        tokenizer = open_checkpoint(folder).tokenizer()
        return [tokenizer.apply_chat_template(chat, tools=tools) for tools in (None, [tool])]

    assert rendered(folder) == ["d", "t"]
    open_checkpoint(folder).tokenizer().save(folder)
    assert rendered(folder) == ["d", "t"]
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("of its own")
    assert rendered(folder) == ["d", "of its own"]


def test_a_chat_template_file_goes_first(folder):
    (folder / "chat_template.jinja").write_text("of its own")
    chat = [{"role": "user", "content": "hi"}]
    assert open_checkpoint(folder).tokenizer().apply_chat_template(chat) == "of its own"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"architectures": ["MistralForCausalLM"], "sliding_window": None}, 2048),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 512}, 512),
        ({"architectures": ["MistralForCausalLM"]}, 2048),  # 4096 where it is left out
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, 2048),
        ({"num_key_value_heads": 3, "head_dim": 16, "rope_theta": 1000000}, 2048),
    ],
)
def test_configurations_in_other_words(gguf, tmp_path, changes, expected, caplog):
    config = open_checkpoint(write_tiny_folder(tmp_path / "model", gguf, changes=changes)).config
    assert config.max_position_embeddings == expected
    assert ("window of 512 tokens" in caplog.text) == (expected == 512)
    mistral = changes.get("architectures") == ["MistralForCausalLM"]
    assert config.architecture == ("mistral" if mistral else "llama")
    rope = changes.get("rope_parameters", changes)
    assert config.rope_theta == rope.get("rope_theta", 10000.0)
    assert isinstance(config.rope_theta, float)


def test_the_stretching_of_llama_3_1(gguf, tmp_path):
    wide = write_tiny_checkpoint(tmp_path / "wide.gguf", head_dim=128, num_layers=1)
    changes = {"rope_parameters": LLAMA3 | {"rope_theta": 500000.0}}
    config = open_checkpoint(write_tiny_folder(tmp_path / "m", wide, changes=changes)).config
    # The published model: pairs 0 to 28 turn fast, from 35 on they are 8 times as slow.
    assert config.rope_divisors is not None
    assert config.rope_divisors[:29] == (1.0,) * 29
    assert config.rope_divisors[35:] == (8.0,) * 29
    # Pair 32: wavelength 2 pi sqrt(5e5) = 4443, 8192 / 4443 = 1.844 turns, (1.844 - 1) / 3 = 0.281.
    assert config.rope_divisors[32] == pytest.approx(1 / (0.2813 + 0.7187 / 8), rel=1e-3)
    assert config.rope_theta == 500000.0


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"architectures": ["MambaForCausalLM"]},
            "is MambaForCausalLM, supported are LlamaForCausalLM, MistralForCausalLM, Qwen2For",
        ),
        ({"architectures": None}, "architecture is None"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "low_freq_factor must be float, got None",
        ),
        (
            {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0, "high_freq_factor": 4.0}},
            r"low_freq_factor 4\.0 must be below high_freq_factor 4\.0",
        ),
        ({"rope_scaling": LLAMA3 | {"factor": float("nan")}}, "factor must be positive, got nan"),
        (
            {"rope_scaling": LLAMA3, "architectures": ["MistralForCausalLM"]},
            "rope_type is 'llama3', supported for mistral is 'default'",
        ),
        ({"head_dim": 15}, "head_dim must be even for rotary positions, got 15"),
        (
            {"architectures": ["Qwen2ForCausalLM"], "attention_bias": None},
            r"lacks 6 of 27 tensors, the first 'model\.layers\.0\.self_attn\.q_proj\.bias'",
        ),
        (
            {"architectures": ["Qwen3ForCausalLM"], "attention_bias": True},
            "attention_bias is True, supported for qwen3 is False",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        ({"rope_scaling": 2.0}, "must be an object"),
        ({"attention_bias": True}, "attention_bias is True, supported for llama is False"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"vocab_size": None}, "vocab_size must be int, got None"),
        ({"hidden_size": "48"}, "hidden_size must be int, got '48'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be positive"),
        ({"num_key_value_heads": 4}, "6 query heads do not divide over 4"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be bool"),
        (
            {"num_hidden_layers": 10**6},
            "num_hidden_layers is 1,000,000, but there are only 21 tensors",
        ),
        ({"head_dim": 2**40}, "head_dim must be at most 65536"),
        ({"num_hidden_layers": 3}, r"lacks 9 of 30 tensors, the first 'model\.layers\.2"),
        ({"num_hidden_layers": 1}, "holds 9 tensors that the family llama is not known to use"),
        ({"hidden_size": 64}, r"has the shape \(384, 48\), but config.json requires \(384, 64\)"),
    ],
)
def test_configurations_that_are_refused(gguf, tmp_path, changes, complaint):
    folder = write_tiny_folder(tmp_path / "model", gguf, changes=changes)
    with pytest.raises(CheckpointError, match=complaint):
        open_checkpoint(folder)


def test_a_truncated_file_is_named_wherever_it_ends(folder):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    for length in [0, 4, 100, 1000, 4000, len(content) // 2, len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            open_checkpoint(folder)


def rewrite_header(path: Path, old: str, new: str) -> None:
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size].decode()
    assert old in header
    head = header.replace(old, new).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + content[8 + size :])


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('"F32"', '"F8_E4M3"', "stored as F8_E4M3, supported are F32, F16, BF16"),
        ('"F32"', '"F16"', "does not take the bytes"),
        ("[384, 48]", "[384, 47]", "does not take the bytes"),
        ("[384, 48]", "[-384, -48]", "does not take the bytes"),
        ("[384, 48]", "[384, 48.0]", "does not take the bytes"),
        ('"F32"', "[]", r"stored as \[\], supported"),
        ("[384, 48]", "null", "the entry of 'model.embed_tokens.weight' is damaged"),
        ("{", "[", "is damaged"),
    ],
)
def test_headers_that_are_damaged(folder, old, new, complaint):
    rewrite_header(folder / "model.safetensors", old, new)
    with pytest.raises(CheckpointError, match=complaint):
        open_checkpoint(folder)


def test_a_missing_part(gguf, tmp_path):
    folder = write_tiny_folder(tmp_path / "model", gguf, num_parts=3)
    part = folder / "model-00002-of-00003.safetensors"
    part.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"cannot read .*model-00002-of-00003"):
        open_checkpoint(folder)
    part.write_bytes((folder / "model-00001-of-00003.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"00002-of-00003.* lacks the tensor 'model"):
        open_checkpoint(folder)


@pytest.mark.parametrize("weight_map", [None, [], {"model.norm.weight": 1}])
def test_an_index_that_is_damaged(folder, weight_map):
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="has no weight_map of file names"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("tokenizer.json", None, "has no tokenizer.json"),
        ("tokenizer.json", "{}", "tokenizer.json cannot be read"),
        ("generation_config.json", "{", "generation_config.json is damaged"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json is damaged"),
    ],
)
def test_tokenizers_that_are_damaged(folder, name, content, complaint):
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(CheckpointError, match=complaint):
        open_checkpoint(folder).tokenizer()


def test_a_tokenizer_of_a_larger_model(folder):
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    values["model"]["vocab"]["[one more]"] = 384
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="385 tokens, the embedding only 384"):
        open_checkpoint(folder).tokenizer()
