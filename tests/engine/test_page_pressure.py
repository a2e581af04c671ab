"""Requests that wait for pages although a row is free."""

from pathlib import Path

import pytest

from fairkv_jax import LLM
from fairkv_jax.engine.llm_engine import LLMEngine
from tests.engine.drive import (
    alone,
    check_idle,
    check_owners,
    greedy,
    random_prompt,
    request,
    run,
    tiny_cache_bytes,
)


@pytest.fixture(scope="module")
def tight(tiny_checkpoint: Path) -> LLMEngine:
    """Two rows, but pages for one request of full length only: 6 heads of 8 pages."""
    llm = LLM(
        model=tiny_checkpoint,
        max_model_len=128,
        max_num_seqs=2,
        kv_cache_memory_bytes=tiny_cache_bytes(6 * 8, 2, 128),
        progress=False,
    )
    return llm.engine


def test_a_request_that_does_not_fit_waits(tight: LLMEngine):
    """There is a row for it, but no pages until the first one ends; it then runs as if alone."""
    first = request("first", random_prompt(64), greedy(20))
    second = request("second", random_prompt(60), greedy(10))
    expected = alone(tight, [first, second])
    finished = []
    waited = 0
    for each in (first, second):
        tight.add_request(each)
    outputs = {}
    while tight.has_unfinished_requests():
        for output in tight.step():
            if output.finished:
                finished.append(output.request_id)
                outputs[output.request_id] = output.outputs[0]
        check_owners(tight)
        assert len(tight.scheduler.running) <= 1
        waited += tight.scheduler.row_of("second") is None and tight.scheduler.has_free_row
    assert finished == ["first", "second"]
    assert waited > 2
    for name, (token_ids, _) in expected.items():
        assert outputs[name].token_ids == token_ids
    check_idle(tight)


def test_abort_while_it_waits_for_pages(tight: LLMEngine):
    tight.add_request(request("first", random_prompt(64), greedy(20)))
    tight.add_request(request("second", random_prompt(60), greedy(10)))
    while tight.scheduler.row_of("first") is None:
        tight.step()
    assert tight.scheduler.row_of("second") is None
    tight.abort_request("second")
    assert set(run(tight)) == {"first"}
    check_idle(tight)
