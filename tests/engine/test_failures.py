"""What is left when a step fails: nothing is lost, and the engine goes on."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from fairkv_jax import LLM, SamplingParams
from fairkv_jax.compress.registry import ALLOCATORS, SCORERS
from fairkv_jax.config import ALLOCATOR_NAMES, SCORER_NAMES
from fairkv_jax.engine.device_errors import DeviceError, translate_xla_errors
from fairkv_jax.engine.model_runner import ModelRunner, PrefillTask
from fairkv_jax.engine.output_processor import RequestState
from fairkv_jax.engine.scheduler import Scheduler
from fairkv_jax.engine.timings import StepTimer
from tests.engine.drive import check_idle, greedy, random_prompt, request, run, tiny_cache_bytes

ROWS = {"max_num_seqs": 3, "max_model_len": 256, "progress": False}


@pytest.fixture(scope="module")
def llm(tiny_checkpoint: Path) -> LLM:
    return LLM(tiny_checkpoint, tensor_parallel_size=2, **ROWS)


@pytest.mark.parametrize("failing", ["_insert", "_decode"])
def test_requests_survive_a_step_that_loses_the_cache(
    llm: LLM, failing: str, monkeypatch: pytest.MonkeyPatch
):
    engine = llm.engine
    requests = [request(str(i), random_prompt(40 + i), greedy(12)) for i in range(4)]
    expected = {name: out.outputs[0].token_ids for name, out in run(engine, requests).items()}
    for each in requests:
        engine.add_request(each)
    engine.step()
    original = getattr(ModelRunner, failing)

    def fail(self: ModelRunner, *args: object) -> None:
        # As an error while a step executes: its arguments were donated.
        jax.tree.map(lambda array: array.delete(), self.cache)
        monkeypatch.setattr(ModelRunner, failing, original)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(ModelRunner, failing, fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(engine)
    finished = run(engine)
    assert {name: out.outputs[0].token_ids for name, out in finished.items()} == expected
    check_idle(engine)


def test_requests_survive_a_failing_prefill(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    """The step had taken its state, and with it what the layers before had kept."""
    requests = [request(str(i), random_prompt(130 + i), greedy(12)) for i in range(3)]
    expected = {name: out.outputs[0].token_ids for name, out in run(llm.engine, requests).items()}
    original = ModelRunner.run_chunks

    def fail(self: ModelRunner, task: PrefillTask, start: int, stop: int) -> None:
        jax.tree.map(lambda array: array.delete(), task.carry)
        monkeypatch.setattr(ModelRunner, "run_chunks", original)
        raise RuntimeError("out of memory")

    for each in requests:
        llm.engine.add_request(each)
    llm.engine.step()
    monkeypatch.setattr(ModelRunner, "run_chunks", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(llm.engine)
    finished = run(llm.engine)
    assert {name: out.outputs[0].token_ids for name, out in finished.items()} == expected
    check_idle(llm.engine)


def test_an_interrupt_loses_no_token(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    """Ctrl-C, when tokens have been read and not handed out."""
    requests = [request(str(i), random_prompt(40 + i), greedy(12)) for i in range(2)]
    expected = {name: out.outputs[0].token_ids for name, out in run(llm.engine, requests).items()}
    original = StepTimer.record

    def interrupt(self: StepTimer, *args: object) -> None:
        monkeypatch.setattr(StepTimer, "record", original)
        raise KeyboardInterrupt

    for each in requests:
        llm.engine.add_request(each)
    monkeypatch.setattr(StepTimer, "record", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(llm.engine)
    finished = run(llm.engine)
    assert {name: out.outputs[0].token_ids for name, out in finished.items()} == expected
    check_idle(llm.engine)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_finished_output_survives_a_failure_in_its_step(
    llm: LLM, count: int, monkeypatch: pytest.MonkeyPatch
):
    """It is returned by the next step, wherever the failing one was interrupted."""
    requests = [request(str(i), random_prompt(20 + i), greedy(4)) for i in range(3)]
    expected = {name: out.outputs[0].token_ids for name, out in run(llm.engine, requests).items()}
    for method in (Scheduler.abort, RequestState.output):
        owner = Scheduler if method is Scheduler.abort else RequestState
        calls = []

        def interrupt(self: Any, *args: Any, method: Any = method, calls: list = calls) -> Any:
            result = method(self, *args)
            calls.append(result)
            if len(calls) == count:
                raise KeyboardInterrupt
            return result

        finished = {}
        for each in requests:
            llm.engine.add_request(each)
        with monkeypatch.context() as patch:
            patch.setattr(owner, method.__name__, interrupt)
            while llm.engine.has_unfinished_requests():
                try:
                    outputs = llm.engine.step()
                except KeyboardInterrupt:
                    continue
                finished |= {out.request_id: out for out in outputs if out.finished}
        assert {name: out.outputs[0].token_ids for name, out in finished.items()} == expected
        check_idle(llm.engine)


def test_running_out_of_memory_is_a_sentence():
    """XLA's own error, on whatever device this is."""
    said = r"making the pool: 262144.00 GiB were needed .*: lower x"
    with pytest.raises(DeviceError, match=said), translate_xla_errors("making the pool", "lower x"):
        jax.block_until_ready(jax.jit(lambda: jax.numpy.zeros(1 << 46))())


def test_other_errors_of_the_devices_keep_their_first_line():
    error = jax.errors.JaxRuntimeError("INTERNAL: CUDA_ERROR_ILLEGAL_ADDRESS\nat 0x1\nat 0x2")
    said = r"while running: INTERNAL: CUDA_ERROR_ILLEGAL_ADDRESS$"
    with pytest.raises(DeviceError, match=said), translate_xla_errors("running", "lower x"):
        raise error


def test_a_failed_generate_leaves_no_request_behind(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    def fail(self: ModelRunner, *args: object) -> None:
        jax.tree.map(lambda array: array.delete(), self.cache)
        raise RuntimeError("out of memory")

    prompts = [random_prompt(30, seed) for seed in range(3)]
    with monkeypatch.context() as patch:
        patch.setattr(ModelRunner, "_decode", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            llm.generate(prompts, greedy(4))
    check_idle(llm.engine)
    assert len(llm.generate(prompts, greedy(4))) == 3


def test_preempted_requests_wait_until_there_is_room_for_all_they_had(tiny_checkpoint: Path):
    one_row = 6 * (256 // 16)
    small = tiny_cache_bytes(one_row + one_row // 4, 3, 256)
    llm = LLM(tiny_checkpoint, kv_cache_memory_bytes=small, **ROWS)
    prefills = []
    original = llm.engine.runner.start_prefill
    llm.engine.runner.start_prefill = lambda *a, **k: prefills.append(1) or original(*a, **k)  # pyright: ignore[reportAttributeAccessIssue]
    requests = [request(str(i), random_prompt(8, i), greedy(200)) for i in range(3)]
    assert len(run(llm.engine, requests)) == 3
    # A preempted request that came back at once would be thrown out again every few tokens.
    assert 3 < len(prefills) <= 8
    check_idle(llm.engine)


def test_an_id_may_be_used_again_only_after_its_request(llm: LLM):
    llm.engine.add_request(request("same", random_prompt(5), greedy(2)))
    with pytest.raises(ValueError, match="id 'same' is still running"):
        llm.engine.add_request(request("same", random_prompt(5), greedy(2)))
    run(llm.engine)
    assert set(run(llm.engine, [request("same", random_prompt(5), greedy(2))])) == {"same"}


def test_numpy_values_are_taken(llm: LLM):
    params = SamplingParams(max_tokens=np.int64(3), temperature=np.float32(0), ignore_eos=True)  # pyright: ignore[reportArgumentType]
    (output,) = llm.generate([random_prompt(9)], params)
    assert len(output.outputs[0].token_ids) == 3
    ids = np.array(random_prompt(9))
    np.testing.assert_array_equal(llm.prefill_logits(ids), llm.prefill_logits(ids.tolist()))  # pyright: ignore[reportArgumentType]


def test_every_name_has_a_scorer_or_an_allocator():
    assert tuple(SCORERS) == SCORER_NAMES
    assert set(ALLOCATORS) == set(ALLOCATOR_NAMES)
