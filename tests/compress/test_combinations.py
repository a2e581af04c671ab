"""Scorers with allocators through the whole engine, against NumPy, on one and several devices."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fairkv_jax import LLM
from fairkv_jax.compress import instruction
from fairkv_jax.plan import HeadScores
from tests.engine.drive import greedy, random_prompt
from tests.oracle import allocators, kvzip, scorers
from tests.oracle.forward import Forward, Layer, Llama, forward, read_llama
from tests.oracle.selection import Options, kept_positions

PROMPT = random_prompt(120)
RATIO = 0.6
BUDGETS = [48] * 3
ALPHA = 0.2
HEAD_SCORES = HeadScores("tiny", "test", ((0.3, 0.9, 0.1), (0.2, 0.4, 0.8)), sinks=4, recent=12)
SCORERS: dict[str, Callable[[Layer], np.ndarray]] = {
    "expected_attention": scorers.expected_attention,
    "keydiff": scorers.keydiff,
    "knorm": scorers.knorm,
    "tova": scorers.tova,
}
ALLOCATORS: dict[str, Callable[[np.ndarray], allocators.Positions]] = {
    "uniform": lambda scores: allocators.uniform(scores, BUDGETS),
    "blend": lambda scores: allocators.ada_blend(scores, BUDGETS, ALPHA),
    "reserve": lambda scores: allocators.ada_reserve(scores, BUDGETS, ALPHA),
}


Kept = Callable[[Llama, Forward, LLM], Sequence[allocators.Positions]]
"""Computes the positions that each layer and head keeps: from the model, a forward pass over
`PROMPT`, and the engine, whose tokenizer may be needed."""


@dataclass(frozen=True)
class Case:
    """Options of the engine, and what they keep of `PROMPT`."""

    name: str
    options: dict[str, Any]
    kept: Kept


def of_layers(scorer: str, allocator: str) -> Kept:
    def kept(_: Llama, seen: Forward, __: LLM) -> Sequence[allocators.Positions]:
        return [ALLOCATORS[allocator](SCORERS[scorer](layer)) for layer in seen.layers]

    return kept


def critical(_: Llama, seen: Forward, __: LLM) -> Sequence[allocators.Positions]:
    kept = []
    for layer in seen.layers:
        scores = scorers.expected_attention(layer)
        second = scorers.critical(layer, scores)
        kept.append(allocators.critical_ada(scores, second, BUDGETS, ALPHA))
    return kept


def repeated(plus: bool) -> Kept:
    def kept(model: Llama, _: Forward, llm: LLM) -> Sequence[allocators.Positions]:
        tokenizer = llm.get_tokenizer()
        parts = kvzip.replays(PROMPT, lambda text: tokenizer.encode(text, False), suffix="!")
        return kvzip.kept_positions(kvzip.scores(model, PROMPT, parts, plus), RATIO)

    return kept


def duo(streaming: str) -> Kept:
    def kept(_: Llama, seen: Forward, __: LLM) -> Sequence[allocators.Positions]:
        T = len(PROMPT)
        total = 6 * T - int(6 * T * RATIO)
        budgets = allocators.duo_budgets(HEAD_SCORES.array, T, total, 4, 12)
        assert T in budgets
        assert 16 in budgets
        if streaming == "recent":
            return [[allocators.sinks_and_recent(b, T, 4) for b in layer] for layer in budgets]
        snapkv = Options("snapkv", budget=1, window=8)
        return [
            kept_positions(layer.q, layer.k, snapkv, row)
            for layer, row in zip(seen.layers, budgets.tolist(), strict=True)
        ]

    return kept


def retrieval_keydiff(_: Llama, seen: Forward, __: LLM) -> Sequence[allocators.Positions]:
    T = len(PROMPT)
    total = 6 * T - int(6 * T * RATIO)
    budgets = allocators.budgets_by_scores(HEAD_SCORES.array, T, total, 4, 12)
    assert budgets.sum() == total
    assert len(set(budgets.flat)) == 6
    kept = []
    for layer, row in zip(seen.layers, budgets.tolist(), strict=True):
        scores = scorers.keydiff(layer)
        scores = np.max([scores, *scorers.neighbours(scores)], axis=0)
        scores[:, :4] = np.inf
        kept.append(allocators.uniform(scores, row))
    return kept


CASES = [
    *(
        Case(
            f"{scorer} {allocator}",
            {"kv_scorer": scorer, "kv_allocator": "uniform"}
            if allocator == "uniform"
            else {"kv_scorer": scorer, "kv_allocator": "ada", "kv_safeguard": allocator},
            of_layers(scorer, allocator),
        )
        for scorer, allocator in [
            ("expected_attention", "uniform"),
            ("expected_attention", "reserve"),
            ("keydiff", "reserve"),
            ("knorm", "blend"),
        ]
    ),
    Case(
        "expected_attention",
        {"kv_policy": "expected_attention"},
        of_layers("expected_attention", "blend"),
    ),
    Case("keydiff", {"kv_policy": "keydiff"}, of_layers("keydiff", "uniform")),
    Case("knorm", {"kv_policy": "knorm"}, of_layers("knorm", "uniform")),
    Case("tova", {"kv_policy": "tova"}, of_layers("tova", "uniform")),
    Case(
        "critical_ada",
        {
            "kv_scorer": "expected_attention",
            "kv_allocator": "critical_ada",
            "kv_safeguard": "reserve",
        },
        critical,
    ),
    Case("kvzip", {"kv_policy": "kvzip", "kv_replay_suffix": "!"}, repeated(plus=False)),
    Case("kvzip_plus", {"kv_policy": "kvzip_plus", "kv_replay_suffix": "!"}, repeated(plus=True)),
    Case("duo", {"kv_policy": "duo_attention", "kv_head_scores": HEAD_SCORES}, duo("recent")),
    Case(
        "duo with snapkv",
        {
            "kv_policy": "duo_attention",
            "kv_head_scores": HEAD_SCORES,
            "kv_streaming": "snapkv",
            "kv_window": 8,
        },
        duo("snapkv"),
    ),
    Case(
        "retrieval_keydiff",
        {"kv_policy": "retrieval_keydiff", "kv_head_scores": HEAD_SCORES},
        retrieval_keydiff,
    ),
]
ON_OTHER_DEVICES = ("expected_attention", "tova", "critical_ada", "kvzip_plus", "duo")


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Llama:
    return read_llama(tiny_checkpoint)


@pytest.fixture(scope="module")
def dense(model: Llama) -> Forward:
    return forward(model, PROMPT)


def test_a_prompt_is_repeated_in_parts(
    tiny_checkpoint: Path, model: Llama, monkeypatch: pytest.MonkeyPatch
):
    """Three parts, the last one shorter, and chunks that do not divide them."""
    monkeypatch.setattr(instruction, "PART_TOKENS", 50)
    options = {"kv_replay_suffix": "!", "max_model_len": 512, "prefill_chunk_size": 32}
    llm = LLM(tiny_checkpoint, kv_policy="kvzip_plus", kv_ratio=RATIO, progress=False, **options)
    (output,) = llm.generate([PROMPT], greedy(1), return_kept_positions=True)
    assert output.kept_positions is not None

    def encode(text: str) -> list[int]:
        return llm.get_tokenizer().encode(text, False)

    parts = kvzip.replays(PROMPT, encode, suffix="!", chunk_tokens=50)
    assert len(parts) == 3
    scores = kvzip.scores(model, PROMPT, parts, plus=True)
    for layer, heads in enumerate(kvzip.kept_positions(scores, RATIO)):
        for head, want in enumerate(heads):
            np.testing.assert_array_equal(output.kept_positions[layer][head], want)


@pytest.mark.parametrize("scorer", ["keydiff", "knorm"])
@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_every_head_keeps_a_token_of_a_short_prompt(
    short: dict[str, LLM], scorer: str, length: int
):
    """A head without tokens would have no owner, and nothing generated would be stored for it."""
    (output,) = short[scorer].generate([PROMPT[:length]], greedy(1))
    assert output.kv_lengths is not None
    assert output.kv_lengths.min() >= 1


@pytest.fixture(scope="module")
def short(tiny_checkpoint: Path) -> dict[str, LLM]:
    options = {"kv_allocator": "ada", "kv_ratio": RATIO, "max_model_len": 64, "max_num_seqs": 1}
    return {
        scorer: LLM(tiny_checkpoint, kv_scorer=scorer, progress=False, **options)
        for scorer in ("keydiff", "knorm")
    }


@pytest.mark.parametrize(
    ("case", "num_devices"),
    [
        pytest.param(
            case,
            devices,
            id=f"{case.name}-{devices}",
            marks=[] if devices == 2 else [pytest.mark.long],
        )
        for case in CASES
        for devices in (1, 2, 3, 4)
        if devices == 2 or case.name in ON_OTHER_DEVICES
    ],
)
def test_kept_positions(
    tiny_checkpoint: Path, model: Llama, dense: Forward, case: Case, num_devices: int
):
    llm = LLM(
        tiny_checkpoint,
        tensor_parallel_size=num_devices,
        kv_ratio=RATIO,
        max_model_len=512,
        max_num_seqs=1,
        prefill_chunk_size=32,
        progress=False,
        **case.options,
    )
    (output,) = llm.generate([PROMPT], greedy(1), return_kept_positions=True)
    assert output.kept_positions is not None
    for layer, heads in enumerate(case.kept(model, dense, llm)):
        for head, want in enumerate(heads):
            np.testing.assert_array_equal(output.kept_positions[layer][head], want)
