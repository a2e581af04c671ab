"""Writes the model of a GGUF file again as a Hugging Face folder, in the published layout."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tests.oracle.forward import Llama, read_llama
from tests.oracle.tiny import CHAT_TEMPLATE, CONTROL_TOKENS, MERGES, token_texts

_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_IN_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
_IN_MLP = ("gate_proj", "up_proj", "down_proj")


def write_tiny_folder(
    folder: Path,
    gguf: Path,
    *,
    dtype: str = "F32",
    num_parts: int = 1,
    changes: Mapping[str, Any] | None = None,
) -> Path:
    """Writes weights in `dtype` over `num_parts` files; `changes` go over config.json's values."""
    folder.mkdir(parents=True, exist_ok=True)
    model = read_llama(gguf)
    weights = {published_name(name): value for name, value in model.weights.items()}
    write_safetensors(folder, weights, dtype, num_parts)
    vocab_size = len(weights["model.embed_tokens.weight"])
    files = {
        "config.json": config(model) | dict(changes or {}),
        "generation_config.json": {"eos_token_id": [2, 0]},
        "tokenizer.json": tokenizer(vocab_size),
        "tokenizer_config.json": {
            "bos_token": {"content": "<|im_start|>", "lstrip": False},
            "eos_token": "<|im_end|>",
            "pad_token": None,
            "chat_template": CHAT_TEMPLATE,
        },
    }
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value))
    return folder


def published_name(name: str) -> str:
    """The name that transformers gives the weight: "layers.0.q_proj" is in "self_attn"."""
    if name == "lm_head":
        return "lm_head.weight"
    name, is_bias, _ = name.partition(".bias")
    kind = name.rsplit(".", 1)[-1]
    block = "self_attn." if kind in _IN_ATTENTION else "mlp." if kind in _IN_MLP else ""
    ending = "bias" if is_bias else "weight"
    return f"model.{name.removesuffix(kind)}{block}{kind}.{ending}"


def config(model: Llama) -> dict[str, Any]:
    """The values of config.json, under transformers' names."""
    gate = model.weights["layers.0.gate_proj"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(model.weights["embed_tokens"]),
        "hidden_size": gate.shape[1],
        "intermediate_size": gate.shape[0],
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "max_position_embeddings": 2048,
        "rope_theta": model.rope_theta,
        "rope_scaling": None,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": "lm_head" not in model.weights,
        "hidden_act": "silu",
        "attention_bias": False,
        "eos_token_id": 2,
    }


def write_safetensors(
    folder: Path, weights: Mapping[str, np.ndarray], dtype: str, num_parts: int
) -> None:
    """Spreads the weights over the parts in turn; several get an index."""
    names = [f"model-{i + 1:05}-of-{num_parts:05}.safetensors" for i in range(num_parts)]
    if num_parts == 1:
        names = ["model.safetensors"]
    weight_map = {name: names[i % num_parts] for i, name in enumerate(weights)}
    for part in names:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        data = b""
        for name, value in weights.items():
            if weight_map[name] == part:
                raw = value.astype(_DTYPES[dtype]).tobytes()
                offsets = [len(data), len(data) + len(raw)]
                header[name] = {"dtype": dtype, "shape": value.shape, "data_offsets": offsets}
                data += raw
        head = json.dumps(header).encode()
        (folder / part).write_bytes(len(head).to_bytes(8, "little") + head + data)
    if num_parts > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def tokenizer(vocab_size: int) -> dict[str, Any]:
    """The tiny tokenizer as tokenizer.json describes it."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    digits = {"type": "Digits", "individual_digits": True}
    rules = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": text, "special": True} | rules for i, text in enumerate(CONTROL_TOKENS)
    ]
    words = {"type": "Sequence", "pretokenizers": [digits, byte_level | {"use_regex": True}]}
    vocabulary = {text: i for i, text in enumerate(token_texts(vocab_size))}
    return {
        "version": "1.0",
        # Settings of a training run, which must not cut prompts.
        "truncation": {
            "max_length": 4,
            "stride": 0,
            "strategy": "LongestFirst",
            "direction": "Right",
        },
        "added_tokens": added,
        "pre_tokenizer": words,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": vocabulary,
            "merges": [merge.split(" ") for merge in MERGES],
        },
    }
