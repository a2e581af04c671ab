"""What must hold on every mesh, shown on the real checkpoint (9 query heads, 3 KV heads)."""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fairkv_jax import LLM
from fairkv_jax.engine.request import RequestOutput
from fairkv_jax.plan import Plan, Profile, make_plan
from tests.engine.drive import check_idle, check_owners, greedy, request, run
from tests.engine.texts import STORY

pytestmark = pytest.mark.slow

LENGTHS = (250, 140)  # one bucket; the second is below the budget
BUDGET = 160
NUM_TOKENS = 24
POLICIES: dict[str, dict[str, Any]] = {
    "full": {},
    "ada_snapkv": {"kv_policy": "ada_snapkv", "kv_budget": BUDGET},
}
MESHES = [
    ("ada_snapkv", 4, "fair_copying"),
    pytest.param("ada_snapkv", 3, "best_effort", marks=pytest.mark.long),
    pytest.param("full", 2, "fair_copying", marks=pytest.mark.long),
    pytest.param("full", 8, "static", marks=pytest.mark.long),
    pytest.param("ada_snapkv", 2, "static", marks=pytest.mark.long),
    pytest.param("ada_snapkv", 2, "best_effort", marks=pytest.mark.long),
    pytest.param("ada_snapkv", 2, "fair_copying", marks=pytest.mark.long),
    pytest.param("ada_snapkv", 8, "fair_copying", marks=pytest.mark.long),
]


def head_plan(strategy: str, num_devices: int) -> Plan:
    """Made for heads of unequal weight, other ones in every layer."""
    weights = np.random.default_rng(0).gamma(2.0, 80.0, (30, 3)) + 32
    tokens = tuple(map(tuple, weights.tolist()))
    profile = Profile(model="", policy="ada_snapkv", budget=BUDGET, tokens=tokens)
    plan = make_plan(profile, num_devices, strategy)
    assert (plan.num_extra_replicas > 0) == (strategy == "fair_copying" and num_devices > 1)
    return plan


def continue_story(
    checkpoint: Path, policy: str, num_devices: int = 1, strategy: str = "static"
) -> list[RequestOutput]:
    """Both prompts in one batch, the books checked now and then and at the end."""
    llm = LLM(
        model=checkpoint,
        max_model_len=512,
        max_num_seqs=2,
        kv_cache_memory_bytes=1 << 28,
        progress=False,
        tensor_parallel_size=num_devices,
        head_plan=head_plan(strategy, num_devices),
        **POLICIES[policy],
    )
    ids = llm.get_tokenizer().encode(STORY)
    requests = [request(str(n), ids[:n], greedy(NUM_TOKENS, logprobs=1)) for n in LENGTHS]
    outputs = run(llm.engine, requests, check_owners)
    check_idle(llm.engine)
    return [outputs[each.request_id] for each in requests]


@pytest.fixture(scope="module")
def on_one_device(demo_checkpoint: Path) -> Callable[[str], list[RequestOutput]]:
    """Gives the outputs of a policy."""
    return cache(partial(continue_story, demo_checkpoint))


@pytest.mark.parametrize(("policy", "num_devices", "strategy"), MESHES)
def test_greedy_tokens_do_not_depend_on_the_mesh(
    demo_checkpoint: Path,
    on_one_device: Callable[[str], list[RequestOutput]],
    policy: str,
    num_devices: int,
    strategy: str,
):
    outputs = continue_story(demo_checkpoint, policy, num_devices, strategy)
    for got, want in zip(outputs, on_one_device(policy), strict=True):
        assert got.outputs[0].token_ids == want.outputs[0].token_ids
        assert got.outputs[0].text == want.outputs[0].text
        np.testing.assert_array_equal(got.kv_lengths, want.kv_lengths)
        np.testing.assert_allclose(logprobs(got), logprobs(want), atol=1e-3)


def test_a_budget_no_smaller_than_the_prompt_is_dense_attention(
    on_one_device: Callable[[str], list[RequestOutput]],
):
    """And a smaller one is not: otherwise the comparisons would show nothing."""
    dense, sparse = on_one_device("full"), on_one_device("ada_snapkv")
    assert sparse[1].outputs[0].token_ids == dense[1].outputs[0].token_ids
    assert sparse[1].kv_lengths is not None
    assert (sparse[1].kv_lengths == LENGTHS[1]).all()
    np.testing.assert_allclose(logprobs(sparse[1]), logprobs(dense[1]), atol=1e-4)
    assert sparse[0].kv_lengths is not None
    assert sparse[0].kv_lengths.mean() == pytest.approx(BUDGET, abs=1)  # floors are rounded down
    assert np.abs(np.subtract(logprobs(sparse[0]), logprobs(dense[0]))).max() > 1e-2


def logprobs(output: RequestOutput) -> list[float]:
    """Log-probabilities of the generated tokens."""
    completion = output.outputs[0]
    assert completion.logprobs is not None
    pairs = zip(completion.token_ids, completion.logprobs, strict=True)
    return [step[token].logprob for token, step in pairs]
