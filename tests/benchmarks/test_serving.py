"""The load generator, against a server whose speed is known."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.streams import Answer, random_prompt, summary_ms
from tests.oracle.tiny import write_tiny_checkpoint
from tests.serve.live import ROOT, Server, running
from tests.serve.scripted import ScriptedEngine

STEP_MS = 5.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    checkpoint = write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny.gguf")
    engine = ScriptedEngine(checkpoint, max_num_seqs=8, step_seconds=STEP_MS / 1e3)
    with running(lambda: engine) as server:
        yield server


def measured(server: Server, tmp_path: Path, *arguments: str) -> dict:
    output = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.serving", f"--base-url={server.url}"]
    command += [f"--output={output}", *arguments]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True, timeout=120)
    return json.loads(output.read_text())


def test_a_closed_loop(server: Server, tmp_path: Path):
    flags = ["--num-prompts=12", "--max-concurrency=4", "--input-len=20", "--output-len=10"]
    result = measured(server, tmp_path, *flags)
    assert (result["completed"], result["failed"]) == (12, 0)
    assert result["output_throughput"] == pytest.approx(120 / result["duration_s"])
    assert result["total_token_throughput"] == pytest.approx(360 / result["duration_s"])
    # No token comes sooner than its step; how much later is the machine's business.
    assert result["tpot_ms"]["mean"] >= STEP_MS
    assert result["ttft_ms"]["p50"] >= STEP_MS
    assert result["e2el_ms"]["p50"] >= 10 * STEP_MS
    assert result["duration_s"] >= 3 * 10 * STEP_MS / 1e3


def test_an_open_loop_sends_at_its_rate_and_failures_are_counted(server: Server, tmp_path: Path):
    flags = ["--num-prompts=20", "--request-rate=20", "--input-len=300", "--output-len=2"]
    result = measured(server, tmp_path, *flags, "--range-ratio=0.9", "--seed=1")
    assert result["completed"] + result["failed"] == 20
    assert 0 < result["failed"] < 20  # prompts of more than the 512 tokens that fit
    assert "1 to 511 fit the context" in result["errors"][0]
    assert 0.4 < result["duration_s"] < 20


def test_the_stall_of_a_server_that_does_not_stall(server: Server, tmp_path: Path):
    flags = ["--stall", "--num-streams=2", "--quiet-seconds=0.5", "--input-len=400"]
    result = measured(server, tmp_path, *flags)
    assert result["quiet_itl_ms"]["mean"] >= STEP_MS
    assert 0 < result["ratio_of_means"] < 10


def test_a_gap_that_spans_a_moment_counts_to_both_sides():
    answer = Answer(1, arrivals=[(1.0, 1), (2.0, 1), (8.0, 2), (8.5, 1)])
    assert answer.output_tokens == 5
    assert answer.intervals() == [1.0, 3.0, 3.0, 0.5]  # two that came together share six seconds
    assert answer.intervals(4.0, 6.0) == [3.0, 3.0]
    assert answer.intervals(8.2) == [0.5]
    assert summary_ms(answer.intervals())["max"] == 3000


def test_random_prompts_repeat_with_their_seed():
    first, again = (random_prompt(np.random.default_rng(3), range(10, 20), 50) for _ in range(2))
    assert first == again
    assert set(first) <= set(range(10, 20))
