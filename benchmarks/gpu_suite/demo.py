"""The demo model end to end: the engine's own generate, and the HTTP server under load."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu_suite.inputs import Sizes
from benchmarks.server_process import server_process
from fairkv_jax.pallas.ragged_decode import Device

REQUESTS_PER_ROW = 4
SERVE_SECONDS = 300
"""Time limit of the requests to the server."""


def generate(sizes: Sizes, _device: Device) -> Iterator[dict[str, Any]]:
    """Generated tokens a second, greedy, all requests alike; what is missing where it cannot."""
    # Here, because the other parts do without the engine's own dependencies.
    from fairkv_jax import LLM, SamplingParams

    if missing := _missing():
        yield missing
        return
    rows, prompt, new = sizes.demo
    llm = LLM(**_options(sizes), progress=False)
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


def serve(sizes: Sizes, device: Device) -> Iterator[dict[str, Any]]:
    """`benchmarks.serving` against a server process, with as many streams as the batch has rows."""
    if missing := _missing():
        yield missing
        return
    rows, prompt, new = sizes.demo
    cpu = {"JAX_PLATFORMS": "cpu"} if device.platform == "cpu" else {}
    environment = {**os.environ, **cpu}
    with (
        server_process(_options(sizes), environment) as url,
        tempfile.TemporaryDirectory() as folder,
    ):
        output = Path(folder) / "serving.json"
        command = [sys.executable, "-m", "benchmarks.serving", f"--base-url={url}"]
        command += [f"--max-concurrency={rows}", f"--num-prompts={REQUESTS_PER_ROW * rows}"]
        command += [f"--input-len={prompt}", f"--output-len={new}", f"--output={output}"]
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=SERVE_SECONDS,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"benchmarks.serving failed: {done.stderr[-150:]}")
        found = json.loads(output.read_text(encoding="utf-8"))
    if found["failed"]:
        raise RuntimeError(f"{found['failed']} requests failed: {found['errors']}")
    record = {
        "requests": found["completed"],
        "streams": rows,
        "prompt_tokens": prompt,
        "new_tokens": new,
        "seconds": found["duration_s"],
        "tokens_per_second": found["output_throughput"],
    }
    for name in ("ttft", "itl", "e2el"):
        record |= {f"{name}_{at}_ms": found[f"{name}_ms"][at] for at in ("p50", "p99")}
    yield record


def _missing() -> dict[str, Any] | None:
    from fairkv_jax.checkpoint.fetch import DEMO_MODEL, checkpoints_root

    if any((checkpoints_root() / DEMO_MODEL).glob("*.gguf")):
        return None
    return {"skipped": f"{DEMO_MODEL} is not there: python -m fairkv_jax.checkpoint fetch"}


def _options(sizes: Sizes) -> dict[str, Any]:
    """Options of the engine and of the server."""
    from fairkv_jax.checkpoint.fetch import DEMO_MODEL

    rows, prompt, new = sizes.demo
    return {
        "model": DEMO_MODEL,
        "tensor_parallel_size": 1,
        "max_model_len": prompt + new,
        "max_num_seqs": rows,
        "kv_policy": "ada_snapkv",
        "kv_budget": max(40, prompt // 4),
    }
