"""An engine that writes a schedule log, and requests with every kind of option for it."""

from pathlib import Path
from typing import Any

import numpy as np

from fairkv_jax.config import EngineConfig, KVConfig
from fairkv_jax.engine.build import build_engine
from fairkv_jax.engine.llm_engine import LLMEngine
from fairkv_jax.engine.page_tables import PageTableUpdate
from fairkv_jax.engine.request import Request
from fairkv_jax.engine.schedule_log import Header
from fairkv_jax.engine.scheduler_output import SchedulerOutput
from fairkv_jax.engine.timings import StepTimer, Timings
from fairkv_jax.plan import Plan, Profile, make_plan
from fairkv_jax.sampling_params import SamplingParams, StructuredOutputsParams
from tests.engine.drive import greedy, random_prompt, request, tiny_cache_bytes

MAX_TOKENS, NUM_ROWS = 128, 4
NUM_PAGES = {2: 32, 3: 26}
"""Pages per device, by the number of devices: so few that a request is preempted."""


class SteadyTimer(StepTimer):
    """Measures nothing: up to four decode steps at once, and one chunk at a time."""

    def __init__(self):
        super().__init__()
        self.timings = Timings(step_seconds=0.01)

    def record(self, *args: object) -> None:
        pass


def plan_with_replicas(num_devices: int) -> Plan:
    """Two layers of three heads; the heaviest head of each layer has a replica."""
    profile = Profile("", "ada_snapkv", 40, ((80.0, 10.0, 20.0), (20.0, 10.0, 90.0)))
    return make_plan(profile, num_devices, max_extra_replicas=1)


HEADER = Header(
    model="/models/tiny.gguf",
    fingerprint="abc",
    plan=plan_with_replicas(2),
    engine_config=EngineConfig(max_num_seqs=3, quantization="int8"),
    kv_config=KVConfig("head_budgets", head_budgets=((1, 2, 3), (4, 5, 6))),
    has_prompts=True,
    platform="cpu",
    version="1.2",
)

EMPTY = SchedulerOutput(
    resets_cache=False,
    index=4,
    preempted_request_ids=(),
    finished_request_ids=(),
    released_rows=(),
    page_table_update=PageTableUpdate(*[np.zeros(0, np.int64)] * 4),
    insertion=None,
    prefill=None,
    decode=None,
)


def logged_engine(
    checkpoint: Path, log: Path, *, num_devices: int = 2, prompts: bool = True, **options: Any
) -> LLMEngine:
    """An engine with head replicas and a pool that the requests below fill."""
    settings: dict[str, Any] = {
        "tensor_parallel_size": num_devices,
        "head_plan": plan_with_replicas(num_devices),
        "kv_policy": "ada_snapkv",
        "kv_budget": 40,
        "kv_window": 8,
        "max_model_len": MAX_TOKENS,
        "max_num_seqs": NUM_ROWS,
        "prefill_chunk_size": 32,
        "kv_cache_memory_bytes": num_devices
        * tiny_cache_bytes(NUM_PAGES[num_devices], NUM_ROWS, MAX_TOKENS),
        "schedule_log": log,
        "schedule_log_prompts": prompts,
        "progress": False,
    }
    engine = build_engine(checkpoint, **settings | options)
    engine._timer = SteadyTimer()
    assert engine.plan.num_extra_replicas > 0
    return engine


def mixed_requests(seed: int = 0) -> list[Request]:
    """Greedy, sampled, structured and penalised requests, with options of their own.

    Their lengths are the same for every `seed`; only the prompts differ.
    """
    digits = StructuredOutputsParams(regex="[0-9]{60}")
    cases: list[tuple[int, SamplingParams, dict[str, Any]]] = [
        (60, greedy(40), {}),
        (70, sampled(30, top_k=30, logprobs=3), {}),
        (33, sampled(20, seed=5, top_p=0.9), {"kv_policy": "snapkv", "kv_budget": 16}),
        (80, greedy(45, prompt_logprobs=2), {"return_kept_positions": True}),
        (50, sampled(30, seed=1, frequency_penalty=1.0, repetition_penalty=1.2), {}),
        (20, sampled(10, structured_outputs=digits), {}),
        (90, greedy(30, logit_bias={30: 3.0}, min_tokens=5, stop=["zzzz"]), {"kv_budget": 24}),
        (64, greedy(20, presence_penalty=1.5), {"kv_policy": "streaming_llm"}),
        (75, greedy(40), {}),
        (10, greedy(0, prompt_logprobs=1), {}),
    ]
    return [
        request(str(number), random_prompt(length, seed), params, **options)
        for number, (length, params, options) in enumerate(cases)
    ]


def sampled(max_tokens: int, **options: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, **options)


def run_with_aborts(engine: LLMEngine, requests: list[Request]) -> dict[str, list[int]]:
    """Runs requests and aborts one that runs and one that is being read; returns the tokens."""
    for each in requests:
        engine.add_request(each)
    tokens: dict[str, list[int]] = {}
    left = {"running": 1, "waiting": 1}
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens[output.request_id] = output.outputs[0].token_ids
        scheduler = engine.scheduler
        first = scheduler.waiting[0] if scheduler.waiting and scheduler.running else None
        if left["waiting"] and first and 0 < first.chunks_scheduled < first.num_chunks:
            engine.abort_request(first.request_id)
            left["waiting"] = 0
        elif left["running"] and len(scheduler.running) >= 2:
            engine.abort_request(scheduler.running[max(scheduler.running)].request_id)
            left["running"] = 0
    assert not any(left.values()), "nothing was aborted"
    return tokens
