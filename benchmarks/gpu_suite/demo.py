"""The demo model end to end: tokens per second of the engine's own generate."""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.gpu_suite.inputs import Sizes
from fairkv_jax.pallas.ragged_decode import Device


def measure(sizes: Sizes, _device: Device) -> Iterator[dict[str, Any]]:
    """Generated tokens a second, greedy, all requests alike; what is missing where it cannot."""
    # Here, because the other parts do without the engine's own dependencies.
    from fairkv_jax import LLM, SamplingParams
    from fairkv_jax.checkpoint.fetch import DEMO_MODEL, checkpoints_root

    if not any((checkpoints_root() / DEMO_MODEL).glob("*.gguf")):
        yield {"skipped": f"{DEMO_MODEL} is not there: python -m fairkv_jax.checkpoint fetch"}
        return
    rows, prompt, new = sizes.demo
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
    yield {
        "requests": rows,
        "prompt_tokens": prompt,
        "new_tokens": new,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
    }
