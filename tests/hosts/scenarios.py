"""Requests of every kind, and what they gave, for an engine on one host or on several."""

import json
import time
from collections.abc import Callable
from typing import Any

from fairkv_jax.engine.llm_engine import LLMEngine
from fairkv_jax.engine.request import Request, RequestOutput
from tests.engine.drive import greedy, random_prompt, request, run
from tests.engine.logged import mixed_requests, run_with_aborts, sampled


def short(engine: LLMEngine) -> Any:
    """Greedy and seeded requests."""
    requests = [
        request("greedy", random_prompt(60), greedy(20)),
        request("seeded", random_prompt(50, seed=1), sampled(20, seed=5, top_p=0.9)),
        request("drawn", random_prompt(45, seed=2), sampled(20)),
    ]
    return _results(run(engine, requests))


def mixed(engine: LLMEngine) -> Any:
    """Greedy, sampled, structured and penalised requests, of which one is preempted."""
    results = _results(run(engine, mixed_requests()))
    assert engine.scheduler.num_preemptions > 0
    return results


def aborted(engine: LLMEngine) -> Any:
    """Requests of which two are aborted; how far those come depends on the executions in flight."""
    requests = mixed_requests(seed=1)
    tokens = run_with_aborts(engine, requests)
    complete = {
        each.request_id: tokens[each.request_id]
        for each in requests
        if len(tokens.get(each.request_id, ())) == each.sampling_params.max_tokens
    }
    assert len(complete) >= len(requests) - 3
    return complete


def choices(engine: LLMEngine) -> Any:
    """Several answers to one prompt, which share its pages."""
    prompt = random_prompt(40, seed=3)
    requests = [
        request(str(n), prompt, sampled(10, seed=n), same_prompt="shared") for n in range(3)
    ]
    return _results(run(engine, requests))


def prefixes(engine: LLMEngine) -> Any:
    """A prefix that is cached, continued by two requests, and deleted."""
    document = random_prompt(60, seed=4)
    run(engine, [Request("d", document, caches_prefix=True, require_query_agnostic=False)])
    (record,) = engine.prefixes.of_owner()
    requests = [
        request(str(n), random_prompt(9 + n, seed=n), greedy(12), prefix_id=record.id)
        for n in range(2)
    ]
    outputs = run(engine, requests)
    assert all(output.num_cached_tokens for output in outputs.values())
    engine.delete_prefix(record.id)
    return _results(outputs)


def long_outputs(engine: LLMEngine) -> Any:
    """Requests that generate more than `kv_decode_budget` lets them keep."""
    requests = [request(str(n), random_prompt(20, seed=n), greedy(230)) for n in range(2)]
    return _results(run(engine, requests))


def endless(engine: LLMEngine) -> Any:
    """Generates until the process ends."""
    while True:
        run(engine, [request("endless", random_prompt(40), greedy(60))])
        print(json.dumps({"stepping": True}), flush=True)


def idle(engine: LLMEngine) -> Any:
    """Does nothing, after a request, until the process ends."""
    run(engine, [request("one", random_prompt(40), greedy(4))])
    print(json.dumps({"stepping": True}), flush=True)
    while True:
        time.sleep(0.1)


SCENARIOS: dict[str, Callable[[LLMEngine], Any]] = {
    each.__name__: each
    for each in (short, mixed, aborted, choices, prefixes, long_outputs, endless, idle)
}


def _results(outputs: dict[str, RequestOutput]) -> Any:
    """What must not depend on the number of hosts."""
    return {name: _result(output) for name, output in sorted(outputs.items())}


def _result(output: RequestOutput) -> Any:
    answer, positions = output.outputs[0], output.kept_positions
    return {
        "tokens": answer.token_ids,
        "text": answer.text,
        "reason": answer.finish_reason,
        "kept": None if output.kv_lengths is None else output.kv_lengths.tolist(),
        "positions": positions and [[head.tolist() for head in layer] for layer in positions],
        "logprobs": [sorted(each) for each in answer.logprobs or ()],
        "prompt_logprobs": [sorted(each or ()) for each in output.prompt_logprobs or ()],
    }
