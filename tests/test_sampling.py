"""Sampling against NumPy: what is cut, what is drawn, what is logged."""

from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from scipy.stats import chisquare

from fairkv_jax import sampling
from fairkv_jax.sampling import SamplingState, TokenHistory
from fairkv_jax.sampling_params import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    SamplingParams,
    StructuredOutputsParams,
)
from tests.oracle.sampling import adjusted

VOCAB = 24
DRAWS = 20_000
jitted: Any = jax.jit(sampling.sample)
truncate: Any = jax.jit(sampling._truncate)


def sample(
    logits: np.ndarray,
    state: SamplingState,
    output_index: np.ndarray,
    history: TokenHistory | None = None,
    grammar_bitmask: np.ndarray | None = None,
) -> Any:
    """Without a word on history or grammar: only options that do not read them."""
    batch = len(logits)
    if history is None:
        history = TokenHistory(np.zeros((batch, 1), np.int32), output_index)  # pyright: ignore[reportArgumentType]
    if grammar_bitmask is None:
        grammar_bitmask = np.zeros((batch, -(-logits.shape[1] // 32)), np.uint32)
    return jitted(logits, state, output_index, history, grammar_bitmask)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def survivors(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The tokens left of one row, in float64: min-p, then top-k, then top-p."""
    scaled = logits.astype(np.float64) / params.temperature
    left = softmax(scaled) >= params.min_p * softmax(scaled).max()
    if params.top_k > 0:
        order = np.sort(np.where(left, scaled, -np.inf))[::-1]
        left &= scaled >= order[min(params.top_k, len(scaled)) - 1]
    if params.top_p < 1:
        p = softmax(np.where(left, scaled, -np.inf))
        order = np.argsort(-p)
        count = np.searchsorted(np.cumsum(p[order]), params.top_p) + 1
        left &= p >= p[order[min(count, len(p)) - 1]]
    return left


CUTS = [
    {},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": VOCAB},
    {"top_k": 10**6},
    {"top_p": 0.01},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"min_p": 0.05},
    {"min_p": 0.3},
    {"min_p": 1.0},
    {"top_k": 7, "top_p": 0.8},
    {"top_k": 9, "top_p": 0.9, "min_p": 0.02},
    {"top_p": 0.7, "temperature": 2.5},
    {"min_p": 0.2, "temperature": 0.4},
]


EXTREMES = [
    {"temperature": 2e-38},
    {"temperature": 1e-45},
    {"top_p": 5e-324},
    {"top_p": 1e-39},
    {"temperature": 2e-38, "top_p": 1e-39, "top_k": 1, "min_p": 1.0},
]


@pytest.mark.parametrize("options", EXTREMES, ids=str)
def test_extreme_options_take_the_likeliest_token(options: dict[str, Any]):
    logits = np.random.default_rng(0).normal(size=(1, VOCAB)).astype(np.float32)
    logits[0, 5] = 40
    state = states([SamplingParams(**options)])
    assert sample(logits, state, np.zeros(1, np.int32)).tokens[0] == 5


def test_the_hottest_temperature_draws_from_all_tokens():
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, 5] = 40
    state = states([SamplingParams(temperature=1e300)])
    drawn = {int(sample(logits, state, np.full(1, i, np.int32)).tokens[0]) for i in range(40)}
    assert len(drawn) > VOCAB // 3


def states(params: list[SamplingParams], seeds: list[int] | None = None) -> SamplingState:
    return SamplingState.stack(list(zip(params, seeds or range(len(params)), strict=True)), VOCAB)


@pytest.mark.parametrize("seed", range(3))
def test_what_is_cut(seed: int):
    """All options side by side in one batch, so that none leaks into its neighbour's row."""
    logits = np.random.default_rng(seed).normal(0, 2, (len(CUTS), VOCAB)).astype(np.float32)
    params = [SamplingParams(**cut) for cut in CUTS]
    scaled = logits / np.array([[p.temperature] for p in params], np.float32)
    left = np.asarray(truncate(scaled - scaled.max(1, keepdims=True), states(params)))
    for row, option, got in zip(logits, params, left, strict=True):
        want = survivors(row, option)
        np.testing.assert_array_equal(np.isfinite(got), want, f"{option}")
        np.testing.assert_allclose(
            softmax(got)[want],
            softmax(row / option.temperature)[want] / softmax(row / option.temperature)[want].sum(),
            rtol=1e-4,
        )


def test_equal_logits_at_the_edge_of_top_k_all_stay():
    logits = np.array([[0.0, -1, -1, -1] + [-5] * (VOCAB - 4)], np.float32)
    left = np.isfinite(np.asarray(truncate(logits, states([SamplingParams(top_k=2)]))))
    assert left[0].tolist() == [True] * 4 + [False] * (VOCAB - 4)


@pytest.mark.parametrize(
    "cut", [{}, {"top_k": 6, "temperature": 1.7}, {"top_p": 0.8}, {"min_p": 0.1}]
)
def test_draws_follow_the_distribution(cut: dict):
    """Chi-square over rows that differ by their seeds; the seeds are fixed."""
    logits = np.random.default_rng(5).normal(0, 1.5, VOCAB).astype(np.float32)
    params = SamplingParams(**cut)
    batch = np.broadcast_to(logits, (DRAWS, VOCAB))
    drawn = sample(batch, states([params] * DRAWS), np.zeros(DRAWS, np.int32)).tokens
    _check_distribution(np.asarray(drawn), logits, params)


def test_places_of_one_output_are_drawn_independently():
    """One seed, many places: the distribution holds along a text too, pairs are uncorrelated."""
    logits = np.random.default_rng(6).normal(0, 1, VOCAB).astype(np.float32)
    params = SamplingParams()
    state = states([params] * DRAWS, [7] * DRAWS)
    batch = np.broadcast_to(logits, (DRAWS, VOCAB))
    drawn = np.asarray(sample(batch, state, np.arange(DRAWS, dtype=np.int32)).tokens)
    _check_distribution(drawn, logits, params)
    p = softmax(logits.astype(np.float64))
    again = np.mean(drawn[1:] == drawn[:-1])
    assert abs(again - (p**2).sum()) < 4 * np.sqrt((p**2).sum() / DRAWS)


def _check_distribution(drawn: np.ndarray, logits: np.ndarray, params: SamplingParams) -> None:
    left = survivors(logits, params)
    counts = np.bincount(drawn, minlength=VOCAB)
    assert not counts[~left].any()
    p = softmax(np.where(left, logits.astype(np.float64) / params.temperature, -np.inf))[left]
    assert chisquare(counts[left], DRAWS * p).pvalue > 1e-3


def test_greedy_takes_the_first_of_the_likeliest_whatever_the_seed():
    logits = np.zeros((3, VOCAB), np.float32)
    logits[:, [4, 9]] = 2.0
    params = [SamplingParams(temperature=0, top_k=3, min_p=0.5)] * 2 + [SamplingParams()]
    drawn = np.asarray(sample(logits, states(params), np.zeros(3, np.int32)).tokens)
    assert drawn[:2].tolist() == [4, 4]


def test_a_row_depends_on_its_seed_and_place_not_on_its_neighbours():
    rng = np.random.default_rng(8)
    logits = rng.normal(0, 1, VOCAB).astype(np.float32)
    mine = SamplingParams(temperature=1.3, top_p=0.95)
    others = [SamplingParams(temperature=0), SamplingParams(top_k=2, logprobs=3)]
    alone = [
        int(sample(logits[None], states([mine], [seed]), np.array([index], np.int32)).tokens[0])
        for seed in (0, 2**40 + 1, -5)
        for index in (0, 3)
    ]
    assert len(set(alone)) > 2
    for row in range(3):
        batch = rng.normal(0, 1, (3, VOCAB)).astype(np.float32)
        batch[row] = logits
        params = [*others[:row], mine, *others[row:]]
        together = []
        for seed in (0, 2**40 + 1, -5):
            for output_index in (0, 3):
                seeds, places = [9, 9, 9], np.array([5, 5, 5], np.int32)
                seeds[row], places[row] = seed, output_index
                together.append(int(sample(batch, states(params, seeds), places).tokens[row]))
        assert together == alone


def test_seeds_differ_in_all_their_bits():
    logits = np.zeros((6, VOCAB), np.float32)
    seeds = [0, 1, 2**32, 2**33, 2**63, -1]
    state = states([SamplingParams()] * 6, seeds)
    tokens = [
        np.asarray(sample(logits, state, np.full(6, output_index, np.int32)).tokens).tolist()
        for output_index in range(8)
    ]
    assert len(set(zip(*tokens, strict=True))) == len(seeds)


def test_logprobs_and_ranks():
    """Those of the model, before temperature and cuts; the rank counts the likelier tokens."""
    rng = np.random.default_rng(9)
    logits = rng.normal(0, 3, (8, VOCAB)).astype(np.float32)
    params = [SamplingParams(temperature=5.0, logprobs=5, top_k=20)] * 8
    out = jax.tree.map(np.asarray, sample(logits, states(params), np.zeros(8, np.int32)))
    want = np.log(softmax(logits.astype(np.float64)))
    assert (out.tokens != logits.argmax(1)).any()
    for row, token in enumerate(out.tokens):
        np.testing.assert_allclose(out.logprob[row], want[row, token], atol=1e-5)
        assert out.rank[row] == 1 + (want[row] > want[row, token]).sum()
        order = np.argsort(-want[row])[:MAX_LOGPROBS]
        np.testing.assert_array_equal(out.top_tokens[row], order)
        np.testing.assert_allclose(out.top_logprobs[row], want[row][order], atol=1e-5)


def test_no_logprobs_unless_a_row_wants_them():
    logits = np.random.default_rng(1).normal(size=(2, VOCAB)).astype(np.float32)
    run = partial(sample, logits, output_index=np.zeros(2, np.int32))
    assert not np.asarray(run(state=states([SamplingParams()] * 2)).top_logprobs).any()
    one = [SamplingParams(), SamplingParams(logprobs=0)]
    assert np.asarray(run(state=states(one)).logprob)[1] < 0


GUIDED = StructuredOutputsParams(json_object=True)
ENDS = (2, 5)


ADJUSTMENTS: list[dict[str, Any]] = [
    {},
    {"presence_penalty": 1.5},
    {"presence_penalty": -2},
    {"frequency_penalty": 0.7},
    {"frequency_penalty": -0.3, "presence_penalty": 0.4},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.4},
    {"logit_bias": {0: 5.0, VOCAB - 1: -100.0, 7: 0.25}},
    {"logit_bias": dict.fromkeys(range(VOCAB), -3.0), "repetition_penalty": 1.3},
    {"min_tokens": 9},
    {"min_tokens": 9, "stop_token_ids": [1, 11]},
    {"min_tokens": 3, "stop_token_ids": [1, 11]},  # those have been generated
    {"structured_outputs": GUIDED},
    {"structured_outputs": GUIDED, "min_tokens": 9, "logit_bias": {3: 10.0}},
    {
        "structured_outputs": GUIDED,
        "logit_bias": {4: 2.0},
        "min_tokens": 5,
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.5,
        "presence_penalty": 0.5,
    },
]


@pytest.mark.parametrize("size", [5, 300, 1024, 2500])
def test_penalties_biases_bans_and_masks(size: int):
    """All options side by side, histories of many lengths, garbage behind each row's last token."""
    rng = np.random.default_rng(size)
    batch = len(ADJUSTMENTS)
    logits = rng.normal(0, 3, (batch, VOCAB)).astype(np.float32)
    params = [SamplingParams(**options) for options in ADJUSTMENTS]
    state = SamplingState.stack([(each, 0) for each in params], VOCAB, ENDS)
    length = rng.integers(5, size + 1, batch).astype(np.int32)
    output_index = np.full(batch, 4, np.int32)
    tokens = rng.integers(0, VOCAB // 2, (batch, size)).astype(np.int32)
    bits = rng.integers(0, 2, (batch, VOCAB)) > 0
    bits[:, 0] = True
    words = np.packbits(np.pad(bits, ((0, 0), (0, 8))), bitorder="little", axis=1).view(np.uint32)
    wanted = []
    for row in range(batch):
        prompt = tokens[row, : length[row] - 4].tolist()
        output = tokens[row, length[row] - 4 : length[row]].tolist()
        allowed = set(np.flatnonzero(bits[row]).tolist())
        wanted.append(adjusted(logits[row], params[row], prompt, output, ENDS, allowed))
    history = TokenHistory(tokens, length)  # pyright: ignore[reportArgumentType]
    got = jax.jit(sampling._adjust)(logits, state, output_index, history, words)
    np.testing.assert_allclose(np.asarray(got), wanted, rtol=1e-5, atol=1e-5)
    drawn = sample(logits, state, output_index, history, words).tokens
    assert np.isfinite(np.take_along_axis(np.array(wanted), np.asarray(drawn)[:, None], 1)).all()


def test_log_probabilities_are_those_of_the_model_whatever_the_options():
    logits = np.random.default_rng(3).normal(size=(2, VOCAB)).astype(np.float32)
    plain = SamplingParams(temperature=0, logprobs=3)
    biased = SamplingParams(temperature=0, logprobs=3, logit_bias={6: 100.0})
    out = sample(logits, states([plain, biased]), np.zeros(2, np.int32))
    want = np.log(softmax(logits.astype(np.float64)))
    assert out.tokens[1] == 6
    np.testing.assert_allclose(out.logprob, want[[0, 1], np.asarray(out.tokens)], atol=1e-5)
    np.testing.assert_array_equal(out.top_tokens[1], np.argsort(-want[1])[:MAX_LOGPROBS])


def test_what_ends_is_drawn_where_nothing_else_is_allowed():
    """A grammar that is over beside a least length: the grammar goes first."""
    logits = np.zeros((1, VOCAB), np.float32)
    params = SamplingParams(structured_outputs=GUIDED, min_tokens=3)
    state = SamplingState.stack([(params, 0)], VOCAB, ENDS)
    only_an_end = np.array([[1 << ENDS[1]]], np.uint32)
    for output_index in (0, 3):
        out = sample(logits, state, np.full(1, output_index, np.int32), grammar_bitmask=only_an_end)
        assert out.tokens[0] == ENDS[1]


@pytest.mark.parametrize("penalty", [1e-300, 1e-30, 1e30, 1e300])
def test_extreme_penalties_give_a_token_that_has_not_been_seen_or_only_those(penalty: float):
    logits = np.linspace(-6, -3, VOCAB, dtype=np.float32)[None]
    params = SamplingParams(repetition_penalty=penalty, temperature=0.1)
    history = TokenHistory(np.arange(VOCAB // 2, VOCAB)[None], np.full(1, VOCAB // 2))  # pyright: ignore[reportArgumentType]
    drawn = int(sample(logits, states([params]), np.zeros(1, np.int32), history).tokens[0])
    assert (drawn >= VOCAB // 2) == (penalty < 1)


def test_as_many_biases_as_are_taken():
    vocab = MAX_LOGIT_BIAS + 20
    logits = np.zeros((1, vocab), np.float32)
    params = SamplingParams(temperature=0, logit_bias=dict.fromkeys(range(MAX_LOGIT_BIAS), -1.0))
    state = SamplingState.stack([(params, 0)], vocab)
    assert sample(logits, state, np.zeros(1, np.int32)).tokens[0] == MAX_LOGIT_BIAS
