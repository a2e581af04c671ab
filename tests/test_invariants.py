"""What every plan, policy and mesh keeps, on the tiny model (3 KV heads)."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fairkv_jax import LLM, SamplingParams
from fairkv_jax.engine.llm_engine import LLMEngine
from fairkv_jax.plan import Plan, Profile, make_plan
from tests.engine import compressed
from tests.engine.drive import check_idle, check_owners, greedy, random_prompt, request, run
from tests.oracle.forward import forward, read_llama
from tests.oracle.selection import Options, kept_positions

LENGTHS = (128, 100, 70)  # one bucket; the last is below the budget
NUM_TOKENS = 40  # every row opens pages on its way
POLICIES: dict[str, dict[str, Any]] = {
    "full": {"kv_policy": "full"},
    "ada_snapkv": {"kv_policy": "ada_snapkv", "kv_budget": 80, "kv_window": 16},
}
OPTIONS = {
    "full": Options("full"),
    "ada_snapkv": Options("ada_snapkv", budget=80, window=16),
}
STRATEGIES = ("static", "best_effort", "fair_copying", "proportional")
ROWS: dict[str, Any] = {
    "max_model_len": 256,
    "max_num_seqs": 2,
    "prefill_chunk_size": 48,  # blocks that end within a page and within a block of keys
    "progress": False,
}


@dataclass(frozen=True)
class Expected:
    """What the NumPy model gives for one prompt."""

    tokens: list[int]
    logprobs: list[float]
    kept: list[list[np.ndarray]]


@pytest.fixture(scope="module")
def expected(tiny_checkpoint: Path) -> dict[str, list[Expected]]:
    """By policy, for each prompt."""
    model = read_llama(tiny_checkpoint)

    def one(policy: str, num_tokens: int) -> Expected:
        prompt = random_prompt(num_tokens)
        dense = forward(model, prompt)
        layers = zip(dense.q, dense.k, strict=True)
        kept = [kept_positions(q, k, OPTIONS[policy]) for q, k in layers]
        return Expected(*compressed.generate(model, prompt, [(num_tokens, kept)], NUM_TOKENS), kept)

    return {policy: [one(policy, length) for length in LENGTHS] for policy in POLICIES}


def head_plan(strategy: str, num_devices: int) -> Plan:
    """Made for heads of unequal weight, so that balanced plans are far from contiguous blocks."""
    tokens = ((100.0, 30.0, 20.0), (15.0, 25.0, 90.0))
    profile = Profile(model="", policy="ada_snapkv", budget=50, tokens=tokens)
    extra = num_devices - 1  # as many as the slots allow would leave no page pressure below
    if strategy == "proportional":
        return make_plan(
            profile,
            num_devices,
            "fair_copying",
            row_split="proportional",
            max_extra_replicas=extra,
        )
    return make_plan(profile, num_devices, strategy, max_extra_replicas=extra)


def test_the_plans_copy_heads():
    """Otherwise the tests below would not show that replicas share rows."""
    for strategy in STRATEGIES:
        copies = [
            head_plan(strategy, num_devices).num_extra_replicas for num_devices in (1, 2, 3, 4, 8)
        ]
        assert [n > 0 for n in copies] == [strategy in STRATEGIES[2:] and n > 0 for n in range(5)]


SHORT = {(1, "fair_copying"), (3, "fair_copying")} | {(2, strategy) for strategy in STRATEGIES}
"""Replicas on some numbers of devices, and every strategy on two; the model has 3 KV heads."""


@pytest.mark.parametrize(
    ("policy", "num_devices", "strategy"),
    [
        pytest.param(
            policy,
            devices,
            strategy,
            marks=[] if (devices, strategy) in SHORT else [pytest.mark.long],
        )
        for policy in POLICIES
        for devices in (1, 2, 3, 4, 8)
        for strategy in STRATEGIES
    ],
)
def test_tokens_owners_and_pages(
    tiny_checkpoint: Path,
    expected: dict[str, list[Expected]],
    policy: str,
    num_devices: int,
    strategy: str,
):
    """Greedy tokens are those of the NumPy model whatever the mesh; the books are right throughout.

    Three requests share two rows, so that one of them joins while the others are on their way.
    """
    llm = LLM(
        model=tiny_checkpoint,
        tensor_parallel_size=num_devices,
        head_plan=head_plan(strategy, num_devices),
        **POLICIES[policy],
        **ROWS,
    )
    params = greedy(NUM_TOKENS, logprobs=0)
    requests = [
        request(str(i), random_prompt(length), params, return_kept_positions=True)
        for i, length in enumerate(LENGTHS)
    ]
    outputs = run(llm.engine, requests, check_owners)
    for i, want in enumerate(expected[policy]):
        output = outputs[str(i)]
        completion = output.outputs[0]
        assert completion.token_ids == want.tokens
        assert completion.logprobs is not None
        logprobs = [
            step[token].logprob
            for step, token in zip(completion.logprobs, want.tokens, strict=True)
        ]
        np.testing.assert_allclose(logprobs, want.logprobs, atol=2e-4)
        assert output.kv_lengths is not None
        assert output.kept_positions is not None
        for layer, heads in enumerate(want.kept):
            for head, kept in enumerate(heads):
                np.testing.assert_array_equal(output.kept_positions[layer][head], kept)
                assert output.kv_lengths[layer, head] == len(kept)
    check_idle(llm.engine)


def test_the_policies_differ_where_the_prompt_exceeds_the_budget(
    expected: dict[str, list[Expected]],
):
    """Otherwise the test above would show nothing; and within the budget they must not differ."""
    dense, sparse = expected["full"], expected["ada_snapkv"]
    assert [d.tokens == s.tokens for d, s in zip(dense, sparse, strict=True)] == [0, 0, 1]


@pytest.mark.parametrize("num_devices", [2, 3])
def test_balanced_plans_spread_the_rows_of_a_copied_head(tiny_checkpoint: Path, num_devices: int):
    """Every replica serves some row once there are more rows than replicas."""
    plan = head_plan("fair_copying", num_devices)
    llm = LLM(model=tiny_checkpoint, tensor_parallel_size=num_devices, head_plan=plan, **ROWS)
    requests = [request(str(i), random_prompt(100, i), greedy(120)) for i in range(2)]
    served = np.zeros(llm.engine.runner.layout.head_of_slot.shape, bool)

    def look(engine: LLMEngine) -> None:
        served[:] |= (engine.scheduler.kv_cache.lengths > 0).any(1)

    run(llm.engine, requests, look)
    replicas = llm.engine.runner.layout.replicas.sum(2)
    assert replicas.max() > 1
    twice = replicas[:, :, None] == 2
    slots = llm.engine.runner.layout.slot_of_head
    for layer, head, device in np.argwhere(twice & (slots >= 0)):
        assert served[layer, slots[layer, head, device]]


@pytest.mark.parametrize(("policy", "num_devices"), [("full", 1), ("full", 3), ("ada_snapkv", 2)])
def test_preemption_changes_no_output(tiny_checkpoint: Path, policy: str, num_devices: int):
    """The pool holds one request of full length: of two long ones the newer must give way."""
    engine_options = {
        "model": tiny_checkpoint,
        "tensor_parallel_size": num_devices,
        "head_plan": head_plan("fair_copying", num_devices),
        **POLICIES[policy],
        **ROWS,
    }
    roomy = LLM(**engine_options)
    slots = int(roomy.engine.runner.layout.replicas.sum((0, 1)).max())
    spec = replace(roomy.engine.runner.cache_spec, pages_per_device=slots * (256 // 16))
    tight = LLM(**engine_options, kv_cache_memory_bytes=spec.bytes_per_device * num_devices)
    assert tight.engine.runner.cache_spec == spec
    sampled = SamplingParams(temperature=0.7, seed=3, max_tokens=120, ignore_eos=True, logprobs=1)
    requests = [
        request("greedy", random_prompt(128), greedy(120)),
        request("sampled", random_prompt(120), sampled, return_kept_positions=True),
        request("short", random_prompt(70), greedy(130)),
    ]
    preempted: set[str] = set()

    def look(engine: LLMEngine) -> None:
        check_owners(engine)
        preempted.update(s.request_id for s in engine.scheduler.waiting if s.output_token_ids[1:])

    calm = run(roomy.engine, requests, look)
    assert not preempted
    pressed = run(tight.engine, requests, look)
    assert preempted
    assert "greedy" not in preempted  # the oldest never gives way
    for name, output in calm.items():
        assert pressed[name].outputs[0].token_ids == output.outputs[0].token_ids
        assert pressed[name].outputs[0].text == output.outputs[0].text
        assert pressed[name].outputs[0].finish_reason == "length"
    assert len(pressed["sampled"].outputs[0].logprobs or []) == 120
    check_idle(tight.engine)
