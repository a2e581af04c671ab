"""Records the positions that kvpress keeps, with PyTorch on CPU in float32.

    python -m benchmarks.kvpress_parity.record --model FOLDER/FILE.gguf --output kept.npz

Needs an environment of its own with kvpress==0.5.5, torch, transformers and gguf. The prompts are
the raw texts of benchmarks/prompts.jsonl, cut to the lengths asked for.
"""

# pyright: reportMissingImports=false

import argparse
import json
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kvpress
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedTokenizerFast

from benchmarks.kvpress_parity.cases import (
    CASE_NAMES,
    CASES,
    SIZE_NAMES,
    SIZES,
    Case,
    Recorded,
)

SNAPKV = {"window_size": 64, "kernel_size": 5}
SCORERS: dict[str, Callable[[Case, float], Any]] = {
    "streaming_llm": lambda case, ratio: kvpress.StreamingLLMPress(ratio),
    "snapkv": lambda case, ratio: kvpress.SnapKVPress(ratio, **SNAPKV),
    "expected_attention": lambda case, ratio: kvpress.ExpectedAttentionPress(
        ratio, epsilon=case.epsilon
    ),
    "keydiff": lambda case, ratio: kvpress.KeyDiffPress(ratio),
    "knorm": lambda case, ratio: kvpress.KnormPress(ratio),
    "tova": lambda case, ratio: kvpress.TOVAPress(ratio),
    "kvzip": lambda case, ratio: kvpress.KVzipPress(ratio),
    "kvzip_plus": lambda case, ratio: kvpress.KVzipPress(ratio, kvzip_plus_normalization=True),
}
ALLOCATORS: dict[str, Callable[[Any], Any]] = {
    "uniform": lambda press: press,
    "ada": lambda press: kvpress.AdaKVPress(press, alpha_safeguard=0.2),
    "critical_ada": lambda press: kvpress.CriticalAdaKVPress(press, alpha_safeguard=0.2),
    "model": lambda press: press,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", type=Path, required=True, help="Path of a GGUF file.")
    parser.add_argument("--output", type=Path, required=True, help="Path of the .npz file.")
    parser.add_argument("--cases", nargs="*", choices=CASE_NAMES, default=CASE_NAMES)
    parser.add_argument("--sizes", nargs="*", choices=SIZE_NAMES, default=SIZE_NAMES)
    parser.add_argument(
        "--lengths", nargs="*", type=int, default=[300, 700, 1200], help="Tokens of each prompt."
    )
    args = parser.parse_args()
    model, tokenizer = load(args.model)
    prompts = read_prompts(tokenizer, args.lengths)
    config = model.config
    versions = {name: version(name) for name in ("kvpress", "torch", "transformers", "gguf")}
    shape = (config.num_hidden_layers, config.num_key_value_heads)
    recorded = Recorded([ids.tolist() for ids in prompts], shape, versions)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        # KVzip opens the tokenizer at the model's own path.
        tokenizer.save_pretrained(folder)
        config._name_or_path = folder
        for index, ids in enumerate(prompts):
            keys = prefill(model, ids, None)
            for case in (case for case in CASES if case.name in args.cases):
                for size in (size for size in SIZES if size.name in args.sizes):
                    press = ALLOCATORS[case.allocator](
                        SCORERS[case.method](case, size.ratio_for(case, len(ids)))
                    )
                    kept = kept_positions(model, ids, press, keys)
                    recorded.kept[case.name, size.name, index] = kept
                    print(f"prompt {index}, {case.name}, {size.name}: {kept.sum()}", flush=True)
            recorded.save(args.output)


def load(path: Path) -> tuple[Any, Any]:
    """Returns the model in float32, and its tokenizer without a chat template."""
    files = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(**files, dtype=torch.float32)
    # Of GGUF files transformers makes a CodeLlamaTokenizer, which encodes differently once it has
    # been saved and opened again; the plain class does not.
    backend = AutoTokenizer.from_pretrained(**files).backend_tokenizer
    return model, PreTrainedTokenizerFast(tokenizer_object=backend)


def read_prompts(tokenizer: Any, lengths: list[int]) -> list[np.ndarray]:
    """Returns token ids of raw texts, one prompt for each length; no two share a text."""
    lines = Path("benchmarks/prompts.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    texts = [
        record.get("prompt") or "\n".join(message["content"] for message in record["messages"])
        for record in records
    ]
    share = len(texts) // len(lengths)
    prompts = []
    for index, length in enumerate(lengths):
        text = "\n\n".join(texts[index * share : (index + 1) * share])
        ids = tokenizer.encode(text, add_special_tokens=False)[:length]
        if len(ids) < length:
            raise ValueError(f"no prompt of {length} tokens: the texts have only {len(ids)}")
        prompts.append(np.array(ids))
    return prompts


def prefill(model: Any, ids: np.ndarray, press: Any) -> list[np.ndarray]:
    """Runs the model on a prompt and returns the keys [K, n, H] that are left in each layer."""
    cache = DynamicCache()
    inputs = {"input_ids": torch.tensor(ids)[None], "past_key_values": cache}
    if press is None:
        model.model(**inputs)
    else:
        with press(model):
            model.model(**inputs)
    return [layer.keys[0].numpy() for layer in cache.layers]


def kept_positions(model: Any, ids: np.ndarray, press: Any, keys: list[np.ndarray]) -> np.ndarray:
    """Returns which positions the press keeps, [L, K, T], bool.

    A press either shortens the cache or notes, for each layer, which keys of which heads are to be
    masked during decoding. Kept keys are found among `keys`, those of the whole prompt.
    """
    left = prefill(model, ids, press)
    kept = np.zeros((len(left), len(left[0]), len(ids)), bool)
    for layer, (remaining, every) in enumerate(zip(left, keys, strict=True)):
        masked = model.model.layers[layer].self_attn.masked_key_indices
        for head in range(kept.shape[1]):
            position = {key.tobytes(): i for i, key in enumerate(every[head])}
            assert len(position) == len(ids), "equal keys at two positions"
            kept[layer, head, [position[key.tobytes()] for key in remaining[head]]] = True
        if masked is not None:
            _, heads, positions = (indices.numpy() for indices in masked)
            kept[layer, heads, positions] = False
    return kept


if __name__ == "__main__":
    main()
