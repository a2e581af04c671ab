"""`python -m fairkv_jax.evaluate` on a tiny model: in its own process and against a server."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fairkv_jax.config import KVConfig
from fairkv_jax.engine.build import build_engine
from fairkv_jax.engine.prefix_registry import PrefixRegistry
from fairkv_jax.evaluate.documents import Document, Question
from fairkv_jax.evaluate.server_runner import ServerRunner
from fairkv_jax.plan import HeadScores
from tests.serve.live import ROOT, own_devices, running
from tests.serve.scripted import ScriptedEngine

QUICK = ("--max-model-len=256", "--max-num-seqs=2", "--lengths=150", "--num-samples=2")
"""The tiny tokenizer has nearly one token a character."""


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fairkv_jax.evaluate", *map(str, arguments)]
    environment = {**os.environ, **own_devices()}
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment
    )


@pytest.fixture
def own_data(tmp_path: Path) -> tuple[Path, Path]:
    """Questions that any model answers, as every text contains "", and a text."""
    questions, text = tmp_path / "own.jsonl", tmp_path / "text.txt"
    context = "The wall is behind the inn. " * 5
    lines = [
        {"context": context, "question": "Where?", "answer": list("abcdefghijklmnopqrstuvwxyz ")},
        {"context": context[5:], "question": "Who?", "answer": list("aeiou tnrsld.,-0123456789")},
    ]
    questions.write_text("\n".join(map(json.dumps, lines)))
    text.write_text("A man walks along the wall and thinks of the inn. " * 12)
    return questions, text


def rows(folder: Path) -> list[dict[str, Any]]:
    records = map(json.loads, (folder / "results.jsonl").read_text().splitlines())
    return [record for record in records if "score" in record]


def test_head_scores_go_with_the_methods_that_use_them(
    tiny_checkpoint: Path, own_data: tuple[Path, Path], tmp_path: Path
):
    """The whole cache, which others are compared to, takes none."""
    scores = tmp_path / "scores.json"
    scores.write_text(HeadScores("", "", ((0.9, 0.1, 0.2), (0.3, 0.8, 0.1))).to_json())
    given = run(
        *(f"--model={tiny_checkpoint}", *QUICK, "--methods=retrieval_keydiff", "--ratios=0.5"),
        *(f"--questions={own_data[0]}", "--question=in_view", f"--kv-head-scores={scores}"),
        f"--output={tmp_path / 'out'}",
    )
    assert given.returncode == 0, given.stderr
    assert {row["method"] for row in rows(tmp_path / "out")} == {"full", "retrieval_keydiff"}


def test_a_sweep_from_end_to_end(
    tiny_checkpoint: Path, own_data: tuple[Path, Path], tmp_path: Path
):
    questions, text = own_data
    arguments = (
        *(f"--model={tiny_checkpoint}", *QUICK, f"--questions={questions}", f"--text={text}"),
        *("--methods=full,streaming_llm,ada_snapkv", "--ratios=0.5,0.8", "--kv-window=8"),
        *("--tensor-parallel-size=2", f"--output={tmp_path / 'out'}"),
    )
    given = run(*arguments)
    assert given.returncode == 0, given.stderr
    found = rows(tmp_path / "out")
    by_task = {task: [r for r in found if r["task"] == task] for task in ("questions", "nll", "kl")}
    assert {task: len(each) for task, each in by_task.items()} == {
        "questions": 2 * (1 + 2 * 2 * 2),
        "nll": 2 * (1 + 2 * 2),
        "kl": 2 * 2 * 2,
    }
    for row in found:
        kept = 1 if row["ratio"] is None else 1 - row["ratio"]
        assert row["kept"] == pytest.approx(kept, abs=0.03)
    assert all(row["score"] >= 0 for row in by_task["kl"])
    figures = json.loads((tmp_path / "out" / "results.json").read_text())["figures"]
    assert len(figures) == (1 + 2 * 2 * 2) + (1 + 2 * 2) + 2 * 2
    assert "<svg" in (tmp_path / "out" / "report.html").read_text()
    again = run(*arguments)
    assert again.returncode == 0, again.stderr
    assert rows(tmp_path / "out") == found
    assert "report written to" in again.stdout


def test_a_server_gives_the_rows_of_the_engine(
    tiny_checkpoint: Path, own_data: tuple[Path, Path], tmp_path: Path
):
    questions, _ = own_data
    shared = ("--methods=streaming_llm,ada_snapkv", "--ratios=0.7", f"--questions={questions}")
    options: dict[str, Any] = {"kv_window": 8, "max_model_len": 256, "max_num_seqs": 2}
    with running(
        lambda: build_engine(tiny_checkpoint, progress=False, enable_prefix_caching=True, **options)
    ) as server:
        given = run(f"--base-url={server.url}", *shared, f"--output={tmp_path / 'server'}")
        assert server.client.get("/v1/prefixes").json()["data"] == []
    assert given.returncode == 0, given.stderr
    assert "ada_snapkv, after was not served" in given.stdout
    local = run(
        *(f"--model={tiny_checkpoint}", "--kv-window=8", *QUICK, *shared),
        f"--output={tmp_path / 'engine'}",
    )
    assert local.returncode == 0, local.stderr
    ignored = ("setup", "kept")

    def comparable(folder: str) -> list[dict[str, Any]]:
        return [
            {key: value for key, value in row.items() if key not in ignored}
            for row in rows(tmp_path / folder)
        ]

    served = [
        row
        for row in comparable("engine")
        if (row["method"], row["question"]) != ("ada_snapkv", "after")
    ]
    assert len(served) == 2 * (1 + 2 + 1)
    assert sorted(comparable("server"), key=str) == sorted(served, key=str)


def test_a_server_that_compresses_has_no_full_cache(tiny_checkpoint: Path):
    document = Document("a b " * 50, (Question("c", ("d",)),))
    engine = ScriptedEngine(tiny_checkpoint)
    engine.kv_config = KVConfig("streaming_llm", budget=64)
    engine.prefixes = PrefixRegistry(engine.model_config, engine.kv_config)
    with running(lambda: engine) as server, ServerRunner(server.url, "full") as runner:
        for ask in (runner.answer_after, lambda one, *rest: runner.answer_in_view([one], *rest)):
            with pytest.raises(ValueError, match=r"keeps only \d+% of a prompt.*--kv-policy full"):
                ask(document, None, 4)
        assert server.client.get("/v1/prefixes").json()["data"] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--methods=best",), "unknown method 'best' in --methods: use some of full, "),
        (("--methods=head_budgets",), "--methods head_budgets cannot be swept by --ratios"),
        (("--ratios=1.5",), "--ratios must lie between 0 and 1, got 1.5"),
        (("--ratios=half",), "--ratios must be numbers separated by commas, got 'half'"),
        (("--lengths=0",), "--lengths must be at least 1, got 0"),
        (("--tasks=niah",), "unknown task 'niah' in --tasks"),
        (("--text=missing.txt",), "cannot read --text missing.txt"),
        (("--haystack=missing.txt",), "cannot read --haystack missing.txt"),
        (("--questions=missing.jsonl",), "cannot read --questions missing.jsonl"),
        (("--base-url=http://127.0.0.1:9",), "--base-url http://127.0.0.1:9 does not answer"),
        (("--base-url=http://x", "--text=a"), "which no server returns"),
        (("--model=missing.gguf",), "missing.gguf"),
    ],
)
def test_bad_input(arguments: tuple[str, ...], said: str, tmp_path: Path):
    given = run(*arguments, f"--output={tmp_path}")
    assert given.returncode == 1
    assert "fairkv_jax.evaluate: " in given.stderr
    assert said in given.stderr


def test_a_length_beyond_the_context(tiny_checkpoint: Path, tmp_path: Path):
    given = run(f"--model={tiny_checkpoint}", *QUICK, "--lengths=400", f"--output={tmp_path}")
    assert given.returncode == 1
    assert "max_model_len 256" in given.stderr
