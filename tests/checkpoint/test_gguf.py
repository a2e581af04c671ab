"""GGUF checkpoints: head order against the oracle's own reading, and files that are wrong."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize

from fairkv_jax.checkpoint import CheckpointError, fetch_demo, open_checkpoint
from fairkv_jax.checkpoint.gguf_checkpoint import model_name
from fairkv_jax.checkpoint.gguf_file import SUPPORTED_TYPES, GGUFFile
from fairkv_jax.models import param_specs
from tests.oracle.forward import Llama, read_llama
from tests.oracle.tiny import write_tiny_checkpoint

UINT32, IQ2_XXS = 4, 16  # numbers of the format: a metadata type, a quantisation


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return write_tiny_checkpoint(folder / "Tiny.F32.gguf", tie_word_embeddings=False)


def expected_layer(model: Llama, layer: int, num_kv_heads: int) -> dict[str, np.ndarray]:
    """One layer in head order, cut out of the oracle's matrices head by head."""
    K, G = num_kv_heads, model.num_heads // num_kv_heads
    H = model.head_dim

    def weight(name: str) -> np.ndarray:
        return model.weights[f"layers.{layer}.{name}"]

    def heads(matrix: np.ndarray) -> list[np.ndarray]:
        return [matrix[start : start + H] for start in range(0, len(matrix), H)]

    def grouped(matrix: np.ndarray) -> np.ndarray:
        query_heads = heads(matrix)
        return np.array([[query_heads[kv * G + g] for g in range(G)] for kv in range(K)])

    return {
        "attn_norm": weight("input_layernorm"),
        "q": grouped(weight("q_proj")),
        "k": np.array(heads(weight("k_proj"))),
        "v": np.array(heads(weight("v_proj"))),
        "o": grouped(weight("o_proj").T),
        "mlp_norm": weight("post_attention_layernorm"),
        "gate": weight("gate_proj"),
        "up": weight("up_proj"),
        "down": weight("down_proj").T,
    }


def check_layer(path: Path, layer: int) -> None:
    checkpoint, model = open_checkpoint(path), read_llama(path)
    expected = expected_layer(model, layer, checkpoint.config.num_kv_heads)
    for kind, value in expected.items():
        actual = checkpoint.tensor(f"layers.{layer}.{kind}")
        assert actual.dtype == np.float32
        np.testing.assert_array_equal(actual, value, err_msg=kind)


@pytest.mark.parametrize("layer", [0, 1])
def test_layers_are_in_head_order(tiny, layer):
    check_layer(tiny, layer)


def test_tensors_outside_the_layers(tiny):
    checkpoint, weights = open_checkpoint(tiny), read_llama(tiny).weights
    np.testing.assert_array_equal(checkpoint.tensor("embed"), weights["embed_tokens"])
    np.testing.assert_array_equal(checkpoint.tensor("norm"), weights["norm"])
    np.testing.assert_array_equal(checkpoint.tensor("lm_head"), weights["lm_head"])


def test_names_and_shapes_are_those_of_the_configuration(tiny):
    checkpoint = open_checkpoint(tiny)
    shapes = {name: checkpoint.tensor(name).shape for name in checkpoint.names()}
    specs = param_specs(checkpoint.config)
    assert shapes == {name: spec.shape for name, spec in specs.items()}
    assert shapes["layers.1.q"] == (3, 2, 16, 48)
    assert shapes["layers.1.down"] == (96, 48)
    assert checkpoint.stored("layers.1.k") == ("F32", 3 * 16 * 48 * 4)


def test_the_configuration_and_the_name(tiny):
    checkpoint = open_checkpoint(str(tiny))
    config = checkpoint.config
    assert checkpoint.name == "Tiny"
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (2, 6, 3)
    assert (config.head_dim, config.hidden_size, config.intermediate_size) == (16, 48, 96)
    assert (config.vocab_size, config.max_position_embeddings) == (384, 2048)
    assert (config.rope_theta, config.rms_norm_eps) == (10000.0, 1e-5)
    assert not config.tie_word_embeddings


def test_tied_embeddings_have_no_lm_head(tmp_path):
    checkpoint = open_checkpoint(write_tiny_checkpoint(tmp_path / "tied.gguf"))
    assert checkpoint.config.tie_word_embeddings
    assert "lm_head" not in checkpoint.names()
    with pytest.raises(CheckpointError, match="no tensor 'lm_head'"):
        checkpoint.tensor("lm_head")


def test_a_folder_with_one_file_is_a_checkpoint(tiny, tmp_path):
    assert open_checkpoint(tiny.parent).name == "Tiny"
    with pytest.raises(CheckpointError, match=r"must hold .*a config\.json or one \.gguf.*none"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct"),
        ("Llama-3.2-1B-Instruct-Q4_K_M.gguf", "Llama-3.2-1B-Instruct"),
        ("model-f16.gguf", "model"),
        ("plain.gguf", "plain"),
    ],
)
def test_names_lose_the_mark_of_quantisation(file, name):
    assert model_name(Path(file)) == name


@pytest.mark.slow
def test_the_demo_is_what_was_published():
    checkpoint = open_checkpoint(fetch_demo())
    config = checkpoint.config
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (30, 9, 3)
    assert (config.head_dim, config.rope_theta) == (64, 1e5)
    assert config.max_position_embeddings == 8192
    assert sum(np.prod(spec.shape) for spec in param_specs(config).values()) == 134_515_008
    check_layer(fetch_demo(), 7)


def write_one_tensor(path: Path, values: np.ndarray, kind: GGMLQuantizationType) -> Path:
    writer = GGUFWriter(path, "llama")
    if kind == GGMLQuantizationType.F16:
        writer.add_tensor("x", values.astype(np.float16))
    elif values.dtype == np.uint8:
        writer.add_tensor("x", values, raw_dtype=kind)
    else:
        writer.add_tensor("x", quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("kind", "dtype", "relative_error"),
    [
        ("F32", np.float32, 0),
        ("F16", np.float16, 2**-11),
        ("BF16", "bfloat16", 2**-8),
        ("Q8_0", np.float32, 1 / 127),
        ("Q4_0", np.float32, 1 / 8),
        ("Q4_1", np.float32, 1 / 8),
    ],
)
def test_stored_types_give_back_the_values(tmp_path, kind, dtype, relative_error):
    values = np.random.default_rng(0).standard_normal((3, 64), dtype=np.float32)
    path = write_one_tensor(tmp_path / "x.gguf", values, GGMLQuantizationType[kind])
    read = GGUFFile(path).read("x")
    assert read.dtype == dtype
    np.testing.assert_array_equal(GGUFFile(path).read("x", 1, 2), read[1:2])
    np.testing.assert_allclose(
        read.astype(np.float32), values, atol=relative_error * np.abs(values).max()
    )


@pytest.mark.parametrize(("kind", "block_bytes"), [("Q4_K", 144), ("Q5_K", 176), ("Q6_K", 210)])
def test_super_blocks_are_read_row_by_row(tmp_path, kind, block_bytes):
    # No encoder exists in Python: blocks of small random bytes, the finite scales written in.
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 64, (3, 2 * block_bytes), dtype=np.uint8)
    path = write_one_tensor(tmp_path / "x.gguf", raw, GGMLQuantizationType[kind])
    read = GGUFFile(path).read("x")
    assert read.shape == (3, 512)
    assert read.dtype == np.float32
    last = dequantize(raw[2, block_bytes:], GGMLQuantizationType[kind])
    np.testing.assert_array_equal(read[2, 256:], last)


def test_every_supported_type_is_tried_above():
    tried = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K"]
    assert list(SUPPORTED_TYPES) == tried


@pytest.mark.parametrize(("window", "expected"), [(512, 512), (4096, 2048)])
def test_a_sliding_window_bounds_the_context_and_says_so(tmp_path, caplog, window, expected):
    path = write_tiny_checkpoint(tmp_path / "tiny.gguf", sliding_window=window)
    assert open_checkpoint(path).config.max_position_embeddings == expected
    assert ("window of 512 tokens" in caplog.text) == (expected == 512)


def test_a_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*nothing\.gguf.*fetch"):
        open_checkpoint(tmp_path / "nothing.gguf")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "cannot read"),
        (b"PK\x03\x04 a zip archive", r"not a GGUF file: it starts with b'PK\\x03\\x04'"),
        (b"GGUF" + struct.pack("<I", 1), "GGUF version 1"),
        (b"GGUF" + struct.pack(">I", 3), "little-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "architecture None"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62), "truncated"),
        (b"GGUF" + struct.pack("<IQQQI", 3, 0, 1, 0, 77), "unknown type 77"),
        # An array of 2^60 integers.
        (b"GGUF" + struct.pack("<IQQQIIQ", 3, 0, 1, 0, 9, 4, 1 << 60), "truncated"),
    ],
)
def test_files_that_are_no_model(tmp_path, content, complaint):
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=complaint):
        open_checkpoint(path)


def test_a_truncated_file_is_named_wherever_it_ends(tiny, tmp_path):
    content, path = tiny.read_bytes(), tmp_path / "cut.gguf"
    for length in [*range(5, 1000, 61), *range(1000, len(content), 20_011), len(content) - 33]:
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"cut\.gguf is truncated"):
            open_checkpoint(path)


def replaced(content: bytes, old: bytes, new: bytes) -> bytes:
    assert content.count(old) == 1, f"{old!r} occurs {content.count(old)} times"
    return content.replace(old, new)


def with_metadata(content: bytes, key: str, value: int) -> bytes:
    """Changes an unsigned number of the metadata."""
    start = content.index(key.encode()) + len(key)
    assert struct.unpack_from("<I", content, start) == (UINT32,)
    return content[: start + 4] + struct.pack("<I", value) + content[start + 8 :]


def with_tensor_type(content: bytes, name: str, number: int) -> bytes:
    """Changes the type of a matrix: it follows the name, the rank and two sizes."""
    start = content.index(name.encode()) + len(name) + 4 + 2 * 8
    return content[:start] + struct.pack("<I", number) + content[start + 4 :]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            lambda c: replaced(c, b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0mamba"),
            "architecture 'mamba', supported are llama",
        ),
        (
            lambda c: with_tensor_type(c, "blk.1.attn_q.weight", IQ2_XXS),
            r"'blk\.1\.attn_q\.weight' is stored as IQ2_XXS, supported are F32, F16",
        ),
        (lambda c: with_tensor_type(c, "blk.1.attn_q.weight", 999), "stored as unknown type 999"),
        (
            lambda c: replaced(c, b"blk.1.attn_q.weight", b"blk.1.attn_q.weighs"),
            r"lacks 1 of 21 tensors, the first 'blk\.1\.attn_q\.weight'",
        ),
        (
            lambda c: with_metadata(c, "llama.block_count", 2**31),
            "block_count is 2,147,483,648, but there are only 21 tensors",
        ),
        (lambda c: with_metadata(c, "llama.block_count", 1), "holds 9 tensors that .* not known"),
        (
            lambda c: with_metadata(c, "llama.feed_forward_length", 95),
            r"'blk\.0\.ffn_gate\.weight' has the shape \(96, 48\), but .* \(95, 48\)",
        ),
        (lambda c: with_metadata(c, "llama.rope.dimension_count", 8), "only 16 is supported"),
        (lambda c: with_metadata(c, "llama.attention.value_length", 8), "only 16 is supported"),
        (lambda c: with_metadata(c, "llama.attention.head_count", 0), "num_heads must be positive"),
        (lambda c: with_metadata(c, "llama.attention.head_count_kv", 4), "6 query heads do not"),
        (
            lambda c: replaced(c, b"llama.context_length", b"llama.context_lengtt"),
            r"llama\.context_length must be int, got None",
        ),
        (lambda c: replaced(c, b"token_embd.weight", b"token_embx.weight"), "no embedding matrix"),
    ],
)
def test_files_that_are_another_model(tiny, tmp_path, change, complaint):
    path = tmp_path / "changed.gguf"
    path.write_bytes(change(tiny.read_bytes()))
    with pytest.raises(CheckpointError, match=complaint):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        (b"\x04\0\0\0\0\0\0\0gpt2", b"\x04\0\0\0\0\0\0\0bert", "of the kind 'bert'"),
        (b"smollm", b"falcon", "pre-tokenizer 'falcon', supported are smollm, gpt-2, llama"),
        (b"tokenizer.ggml.merges", b"tokenizer.ggml.mergez", "holds no usable tokenizer"),
        (b"\x04\0\0\0\0\0\0\0\xc4\xa0 t", b"\x04\0\0\0\0\0\0\0\xc4\xa0 \x01", "merges are broken"),
        (b"[unused7]", b"[unused8]", "1 of 384 tokens repeat"),
    ],
)
def test_tokenizers_that_are_not_supported(tiny, tmp_path, old, new, complaint):
    path = tmp_path / "changed.gguf"
    path.write_bytes(replaced(tiny.read_bytes(), old, new))
    with pytest.raises(CheckpointError, match=complaint):
        open_checkpoint(path).tokenizer()


def test_a_file_that_is_truncated_while_it_is_mapped(tiny, tmp_path):
    """The missing part of the map would end the process."""
    path = tmp_path / "shrinks.gguf"
    path.write_bytes(tiny.read_bytes())
    checkpoint = open_checkpoint(path)
    last = checkpoint.names()[-2]
    assert np.isfinite(checkpoint.tensor(last)).all()
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"has been truncated to .* bytes while it was read"):
        checkpoint.tensor(last)
