"""What our engine keeps of recorded prompts, on CPU or whatever JAX runs on, in float32."""

from pathlib import Path

import numpy as np

from benchmarks.kvpress_parity.cases import Case, Recorded, Size
from fairkv_jax import LLM, SamplingParams


def keep(model: str | Path, case: Case, size: Size, recorded: Recorded) -> dict[int, np.ndarray]:
    """Returns the positions [L, K, T], bool, by the index of each prompt recorded in this case."""
    indices = [
        i for i in range(len(recorded.prompts)) if (case.name, size.name, i) in recorded.kept
    ]
    llm = LLM(
        model,
        dtype="float32",
        max_model_len=max(map(len, recorded.prompts)) + 1,
        max_num_seqs=1,
        progress=False,
        **case.options,
        **size.options,
    )
    prompts = [recorded.prompts[i] for i in indices]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=1), return_kept_positions=True)
    kept = {}
    for index, output in zip(indices, outputs, strict=True):
        assert output.kept_positions is not None
        kept[index] = np.zeros((*recorded.shape, len(output.prompt_token_ids)), bool)
        for layer, heads in enumerate(output.kept_positions):
            for head, positions in enumerate(heads):
                kept[index][layer, head, positions] = True
    return kept
