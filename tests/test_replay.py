"""Replaying a schedule log gives the same tokens (invariant 7), in process and by the command."""

import base64
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import jax
import numpy as np
import pytest

from fairkv_jax.cache import KVCache
from fairkv_jax.engine.device_errors import DeviceError
from fairkv_jax.engine.llm_engine import LLMEngine
from fairkv_jax.engine.model_runner import ModelRunner
from fairkv_jax.engine.schedule_log import LoggedTokens, read_log
from fairkv_jax.engine.scheduler_output import Insertion, SchedulerOutput
from fairkv_jax.replay import Counts, TokensDiffer, open_log, replay
from fairkv_jax.sampling_params import num_bitmask_words
from tests.engine.drive import TINY_VOCAB, greedy, random_prompt, request, run
from tests.engine.logged import logged_engine, mixed_requests, run_with_aborts
from tests.oracle.tiny import write_tiny_checkpoint
from tests.serve.live import PATIENCE_S, ROOT, Process, own_devices

START_S = 400.0
NUM_WORDS = num_bitmask_words(TINY_VOCAB)


def logged_run(checkpoint: Path, log: Path, **options: Any) -> LLMEngine:
    """Writes a log of requests of all kinds, with aborts and a preemption."""
    engine = logged_engine(checkpoint, log, **options)
    run_with_aborts(engine, mixed_requests())
    assert engine.scheduler.num_preemptions > 0
    engine.close()
    return engine


@pytest.fixture(scope="module")
def log(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log with prompts, of two devices."""
    path = tmp_path_factory.mktemp("log") / "with_prompts"
    logged_run(tiny_checkpoint, path)
    return path


def num_logged_tokens(log: Path) -> int:
    results = [entry for entry in read_log(log) if isinstance(entry, LoggedTokens)]
    first = sum((each.first_token is not None) + len(each.other_first_tokens) for each in results)
    return first + sum(len(step) for each in results for step in each.tokens)


def with_entry_changed(log: Path, kind: str, change: Callable[[dict[str, Any]], bool]) -> Path:
    """A copy of a log in which the first entry that `change` accepts is changed."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert any(kind in line and change(line[kind]) for line in lines)
    copy = log.with_name("changed")
    copy.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return copy


def change_a_token(result: dict[str, Any]) -> bool:
    if result["index"] < 5 or not result["tokens"]:
        return False
    result["tokens"][0][-1] += 1
    return True


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fairkv_jax.replay", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("num_devices", [2, pytest.param(3, marks=pytest.mark.long)])
def test_a_replay_gives_the_same_tokens(tiny_checkpoint: Path, tmp_path: Path, num_devices: int):
    log = tmp_path / "log"
    logged_run(tiny_checkpoint, log, num_devices=num_devices)
    counts = replay(*open_log(log))
    results = [entry for entry in read_log(log) if isinstance(entry, LoggedTokens)]
    assert counts == Counts(len(results), num_logged_tokens(log))
    assert counts.num_tokens > 150


def test_a_replay_follows_a_step_that_failed(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The engine starts over with an empty cache; rows and pages are then given out anew."""
    log, original, calls = tmp_path / "log", ModelRunner._decode, []
    engine = logged_engine(tiny_checkpoint, log)

    def fail(self: ModelRunner, *args: Any) -> Any:
        calls.append(args)
        if len(calls) == 12:
            jax.tree.map(lambda array: array.delete(), self.cache)
            raise RuntimeError("out of memory")
        return original(self, *args)

    monkeypatch.setattr(ModelRunner, "_decode", fail)
    for each in mixed_requests():
        engine.add_request(each)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(engine)
    monkeypatch.setattr(ModelRunner, "_decode", original)
    run(engine)
    engine.close()
    outputs = [entry for entry in read_log(log) if isinstance(entry, SchedulerOutput)]
    assert sum(entry.resets_cache for entry in outputs) == 1
    assert replay(*open_log(log)).num_tokens == num_logged_tokens(log)


def test_a_changed_token_is_found(log: Path):
    changed = with_entry_changed(log, "result", change_a_token)
    with pytest.raises(TokensDiffer, match=r"in output \d+, step 0, the token of the decoded row"):
        replay(*open_log(changed))

    def change_the_first(result: dict[str, Any]) -> bool:
        if result["first_token"] is None:
            return False
        result["first_token"] += 1
        return True

    changed = with_entry_changed(log, "result", change_the_first)
    with pytest.raises(TokensDiffer, match=r"the token after the prompt in output \d+ is \d+, but"):
        replay(*open_log(changed))


def test_a_changed_prompt_seed_or_bitmask_is_found(log: Path):
    """What decides the tokens is in the log, and the replay uses it."""

    def change_prompt(output: dict[str, Any]) -> bool:
        new = (output["prefill"] or {}).get("new_request")
        if new:
            new["prompt_token_ids"].reverse()
        return bool(new)

    def change_seed(output: dict[str, Any]) -> bool:
        new = (output["prefill"] or {}).get("new_request")
        if not new or new["request_id"] != "4":
            return False
        new["seed"] += 1
        return True

    def change_bitmask(output: dict[str, Any]) -> bool:
        bitmasks = output["decode"]["grammar_bitmasks"]["items"] if output["decode"] else []
        for _, bitmask in bitmasks:
            first = np.zeros(NUM_WORDS, np.uint32)
            first[1] = 1  # only token 32
            bitmask["data"] = base64.b64encode(first.tobytes()).decode()
        return bool(bitmasks)

    for change in (change_prompt, change_seed, change_bitmask):
        changed = with_entry_changed(log, "output", change)
        with pytest.raises(TokensDiffer):
            replay(*open_log(changed))


def test_other_devices_and_their_failures_are_named(
    log: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    header, entries = open_log(log)

    def fail(self: ModelRunner, output: SchedulerOutput) -> None:
        raise jax.errors.JaxRuntimeError("INTERNAL: broken")

    monkeypatch.setattr(ModelRunner, "execute", fail)
    with pytest.raises(DeviceError, match="failed while executing output 0: INTERNAL: broken"):
        replay(replace(header, platform="gpu"), entries)
    assert "the log was written on gpu and is replayed on cpu" in capsys.readouterr().out


def test_contradictions_are_refused(log: Path):
    def drop_a_row(result: dict[str, Any]) -> bool:
        return bool(result["tokens"] and result["tokens"][0] and [result["tokens"][0].pop()])

    def of_another(result: dict[str, Any]) -> bool:
        result["index"] += 1000
        return True

    for change, sentence in (
        (drop_a_row, r"the result of output \d+ does not have the output's rows"),
        (of_another, r"the log has a result of output 10\d\d, but not the output"),
    ):
        with pytest.raises(ValueError, match=sentence):
            replay(*open_log(with_entry_changed(log, "result", change)))


def test_another_model_is_refused(log: Path, tmp_path: Path):
    other = write_tiny_checkpoint(tmp_path / "tiny.gguf", seed=1)
    with pytest.raises(ValueError, match="give the right one by --model"):
        replay(*open_log(log), model=other)


def test_without_prompts_the_same_shapes_run(
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """Made-up prompts keep other lengths than the logged ones; rows still stay in their pages."""
    log, runners, num_kept = tmp_path / "log", set(), []
    engine = logged_run(tiny_checkpoint, log, prompts=False)
    original = ModelRunner._insert

    def insert(self: ModelRunner, insertion: Insertion) -> None:
        runners.add(self)
        assert self._task is not None
        kept = np.asarray(self._task.prefix.slot_lengths)
        serves = insertion.slot_lengths > 0
        num_kept.append((kept[serves], insertion.slot_lengths[serves]))
        before = pages(self.cache)
        original(self, insertion)
        changed = (pages(self.cache) != before).any(1)
        owned = owned_pages(self, insertion)
        assert set(np.flatnonzero(changed).tolist()) <= owned

    monkeypatch.setattr(ModelRunner, "_insert", insert)
    counts = replay(*open_log(log))
    assert counts.num_tokens == 0
    assert counts.num_outputs > 20
    assert "the log holds no prompts: executing the same shapes with made-up" in (
        capsys.readouterr().out
    )
    assert any((kept > logged).any() for kept, logged in num_kept)
    assert any((kept < logged).any() for kept, logged in num_kept)
    (runner,) = runners
    for name in ("lengths", "num_known"):
        np.testing.assert_array_equal(
            getattr(runner.cache, name), getattr(engine.runner.cache, name)
        )
    assert np.isfinite(np.asarray(runner.cache.pool.k_pages)).all()


def pages(cache: KVCache) -> np.ndarray:
    """All keys and values, one line per page, the pages of one device behind those of another."""
    both = [np.asarray(part) for part in jax.tree.leaves(cache.pool)]
    return np.concatenate([part.reshape(len(part), -1) for part in both], axis=1)


def owned_pages(runner: ModelRunner, insertion: Insertion) -> set[int]:
    """The pages that hold the logged lengths of an inserted row, as indices into `pages`."""
    spec, table = runner.cache_spec, runner.cache.page_table
    starts = np.asarray(table.starts)
    entries = np.asarray(table.pages).reshape(spec.num_devices, -1)
    owned = set()
    for layer, slot in np.argwhere(insertion.slot_lengths):
        device, start = slot // spec.slots_per_device, starts[layer, insertion.row, slot]
        count = -(-insertion.slot_lengths[layer, slot] // spec.page_size)
        first = device * spec.pages_per_device
        owned |= {int(first + page) for page in entries[device, start : start + count]}
    return owned


@pytest.mark.long
def test_a_served_model_is_replayed_by_the_command(tiny_checkpoint: Path, tmp_path: Path):
    log = tmp_path / "served.jsonl"
    arguments = [
        f"--model={tiny_checkpoint}",
        "--port=0",
        "--max-model-len=64",
        "--max-num-seqs=2",
        "--kv-budget=24",
        "--kv-window=8",
        f"--schedule-log={log}",
        "--schedule-log-prompts",
    ]
    body = {"prompt": random_prompt(40), "max_tokens": 12, "n": 2, "seed": 3, "ignore_eos": True}
    with Process("fairkv_jax.serve", arguments, **own_devices()) as process:
        url = process.wait_ready(START_S)
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE_S)
        assert answer.json()["usage"]["completion_tokens"] == 24
        process.send(signal.SIGTERM)
        assert process.status() == 0
    done = command(log)
    assert done.returncode == 0, done.stderr
    found = re.search(r"replayed \d+ outputs and compared (\d+) tokens, all equal", done.stdout)
    assert found is not None
    assert int(found[1]) == num_logged_tokens(log) > 24
    changed = with_entry_changed(log, "result", change_a_token)
    done = command(changed)
    assert done.returncode == 1
    assert "tokens differ: in output" in done.stderr


def test_the_command_without_prompts(tiny_checkpoint: Path, tmp_path: Path):
    engine = logged_engine(tiny_checkpoint, tmp_path / "log", prompts=False)
    run(engine, [request("a", random_prompt(50), greedy(5))])
    engine.close()
    done = command(tmp_path / "log")
    assert done.returncode == 0, done.stderr
    assert "the log holds no prompts" in done.stdout
    assert re.search(r"replayed \d+ outputs and compared no tokens", done.stdout)


def test_the_command_explains_what_it_cannot_replay(log: Path, tmp_path: Path):
    (tmp_path / "empty").write_text("")
    (tmp_path / "text").write_text("some text\n")
    newer = with_entry_changed(log, "header", lambda header: header.update(format=2) is None)
    other = write_tiny_checkpoint(tmp_path / "tiny.gguf", seed=1)
    for arguments, sentence in (
        ([tmp_path / "missing"], "missing cannot be read: No such file or directory"),
        ([tmp_path / "empty"], "the file is empty"),
        ([tmp_path / "text"], "this is not a schedule log, or it is damaged"),
        ([newer], "the log has format 2, this version reads 1: replay it with fairkv-jax"),
        ([log, f"--model={other}"], "give the right one by --model"),
        ([log, f"--model={tmp_path / 'gone'}"], "no checkpoint at"),
    ):
        done = command(*arguments)
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        assert line.startswith("cannot replay ")
        assert sentence in line
        assert not done.stdout
    done = command()
    assert done.returncode == 1
    assert "give one schedule log" in done.stderr + done.stdout
