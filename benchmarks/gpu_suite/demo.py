"""The demo model end to end: tokens per second of the engine's own generate."""

import time
from typing import Any

import numpy as np

from benchmarks.gpu_suite.inputs import Sizes
from fairkv_jax import LLM, SamplingParams
from fairkv_jax.checkpoint.fetch import DEMO_MODEL, checkpoints_root


def measure(sizes: Sizes) -> dict[str, Any]:
    """Generated tokens a second, greedy, all requests alike; what is missing where it cannot."""
    if not any((checkpoints_root() / DEMO_MODEL).glob("*.gguf")):
        return {"skipped": f"{DEMO_MODEL} is not there: python -m fairkv_jax.checkpoint fetch"}
    rows, prompt, new = (2, 64, 4) if sizes.interpret else (32, 1024, 128)
    llm = LLM(
        model=DEMO_MODEL,
        tensor_parallel_size=1,
        max_model_len=prompt + new,
        max_num_seqs=rows,
        kv_policy="ada_snapkv",
        kv_budget=max(40, prompt // 4),
        progress=False,
    )
    rng = np.random.default_rng(0)
    prompts = [rng.integers(10, 40000, prompt).tolist() for _ in range(rows)]
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    llm.generate(prompts, params)
    start = time.perf_counter()
    outputs = llm.generate(prompts, params)
    seconds = time.perf_counter() - start
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    return {
        "requests": rows,
        "prompt_tokens": prompt,
        "new_tokens": new,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
    }
