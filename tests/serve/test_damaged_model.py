"""A model whose logits are not finite: its requests fail with an error, and no JSON holds NaN."""

import json
import logging
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fairkv_jax import LLM, SamplingParams
from fairkv_jax.checkpoint.gguf_file import GGUFFile
from tests.serve.live import Server, running

COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module")
def llm(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """The last norm is finite, and too large for what follows it."""
    path = tmp_path_factory.mktemp("damaged") / "damaged.gguf"
    content = bytearray(checkpoint.read_bytes())
    info = GGUFFile(checkpoint).tensors["output_norm.weight"]
    largest = struct.pack("<f", float(np.finfo(np.float32).max))
    content[info.offset : info.offset + info.num_bytes] = largest * info.shape[0]
    path.write_bytes(content)
    return LLM(path, max_model_len=64, max_num_seqs=2, progress=False)


@pytest.fixture(scope="module")
def damaged(llm: LLM) -> Iterator[Server]:
    llm.engine.warm_up(range(1, 8), 2)
    with running(lambda: llm.engine) as server:
        yield server


def test_offline_the_output_says_so(llm: LLM, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.ERROR):
        (output,) = llm.generate([[5, 6]], SamplingParams(max_tokens=4, temperature=0))
    assert output.outputs[0].finish_reason == "error"
    assert output.outputs[0].token_ids == []
    assert output.error is not None
    assert "not finite" in output.error
    assert "not finite" in caplog.text


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"temperature": 0.0},
        {"logprobs": 3},
        {"prompt_logprobs": 1},
        {"echo": True, "logprobs": 1, "max_tokens": 0},
        {"n": 2},
    ],
)
def test_the_answer_is_an_error(damaged: Server, extra: dict[str, object]):
    body = {"prompt": [5, 6, 7], "max_tokens": 4, **extra}
    response = damaged.client.post(COMPLETIONS, json=body)
    assert response.status_code == 500
    assert "logits are not finite" in response.json()["error"]["message"]
    assert damaged.client.get("/health").status_code == 200


def test_a_stream_ends_with_the_error(damaged: Server):
    body = {"prompt": [5, 6, 7], "max_tokens": 4, "logprobs": 2, "stream": True}
    with damaged.client.stream("POST", COMPLETIONS, json=body) as response:
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert events[-1] == "[DONE]"
    assert "logits are not finite" in json.loads(events[-2])["error"]["message"]
    assert "NaN" not in "".join(events)
    assert "Infinity" not in "".join(events)
