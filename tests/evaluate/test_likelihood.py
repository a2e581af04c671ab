"""NLL and KL over a compressed context against NumPy, on one device and on several."""

from pathlib import Path

import numpy as np
import pytest

from fairkv_jax.engine.llm import LLM
from fairkv_jax.evaluate.likelihood import LikelihoodMeter
from fairkv_jax.evaluate.user_data import SCORED_TOKENS
from fairkv_jax.sampling_params import SamplingParams
from tests.engine import compressed
from tests.engine.drive import random_prompt
from tests.oracle.forward import read_llama

CONTEXT = 90
RATIO = 0.6


@pytest.mark.parametrize("num_devices", [pytest.param(1, marks=pytest.mark.long), 2])
def test_likelihood_is_that_of_numpy(tiny_checkpoint: Path, num_devices: int):
    llm = LLM(
        tiny_checkpoint,
        progress=False,
        kv_policy="ada_snapkv",
        kv_ratio=0.5,
        kv_window=8,
        max_model_len=256,
        tensor_parallel_size=num_devices,
        enable_prefix_caching=True,
    )
    passage = random_prompt(CONTEXT + 1 + SCORED_TOKENS)
    params = SamplingParams(temperature=0, max_tokens=4)
    prompt = passage[:CONTEXT]
    (output,) = llm.generate([prompt], params, kv_ratio=RATIO, return_kept_positions=True)
    meter = LikelihoodMeter(llm.engine.runner, passage)
    got, full = meter.measure(RATIO), meter.measure(None)
    llm.engine.scheduler.reset(llm.engine.output_processor.token_ids)
    assert output.kept_positions is not None
    model = read_llama(tiny_checkpoint)
    ends = range(CONTEXT + 1, CONTEXT + 1 + SCORED_TOKENS)
    q, p = (
        np.array([log_softmax(compressed.forward(model, passage[:end], kept)) for end in ends])
        for kept in ([(CONTEXT, output.kept_positions)], [])
    )
    targets = passage[CONTEXT + 1 :]
    nll = [-each[np.arange(SCORED_TOKENS), targets].mean() for each in (q, p)]
    assert [got.nll, full.nll] == pytest.approx(nll, abs=1e-4)
    assert got.kl == pytest.approx(float((np.exp(p) * (p - q)).sum(1).mean()), abs=1e-4)
    assert got.kl > 0.1
    assert (full.kl, full.kept) == (0, 1)
    assert got.kept == pytest.approx(1 - RATIO, abs=0.02)
    # The engine serves on, though its cache was emptied.
    (again,) = llm.generate([prompt], params, kv_ratio=RATIO)
    assert again.outputs[0].token_ids == output.outputs[0].token_ids


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    return wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())
