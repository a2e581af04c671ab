"""The oracle against numbers worked out by hand."""

import numpy as np
import pytest

from tests.oracle.forward import (
    attention,
    forward,
    gelu_tanh,
    read_llama,
    rms_norm,
    rope_table,
    rotate,
    silu,
)
from tests.oracle.tiny import write_tiny_checkpoint


def test_rope_turns_a_two_dimensional_head_by_its_position():
    cos, sin = rope_table(3, 2, 10000.0, np.float64)
    turned = rotate(np.tile([1.0, 0.0], (1, 3, 1)), cos, sin)
    angles = np.arange(3)  # theta^0 = 1 radian a position
    np.testing.assert_allclose(turned[0], np.stack([np.cos(angles), np.sin(angles)], axis=1))


def test_rope_pairs_the_halves_and_slows_down_along_them():
    cos, sin = rope_table(2, 4, 100.0, np.float64)
    turned = rotate(np.array([[[0.0, 0, 0, 0], [0, 1, 0, 0]]]), cos, sin)
    # The second pair is rows 1 and 3; its frequency is 100^(-2/4) = 0.1.
    np.testing.assert_allclose(turned[0, 1], [0, np.cos(0.1), 0, np.sin(0.1)])


def test_rope_makes_scores_depend_on_distances_only():
    cos, sin = rope_table(12, 8, 10000.0, np.float64)
    q, k = np.random.default_rng(0).standard_normal((2, 8))
    turned_q = rotate(np.tile(q, (1, 12, 1)), cos, sin)[0]
    turned_k = rotate(np.tile(k, (1, 12, 1)), cos, sin)[0]
    assert turned_q[5] @ turned_k[2] == pytest.approx(turned_q[11] @ turned_k[8])
    assert turned_q[5] @ turned_k[2] != pytest.approx(turned_q[5] @ turned_k[3])


def test_rms_norm_and_silu():
    x = np.array([3.0, 4.0])
    np.testing.assert_allclose(
        rms_norm(x, np.array([1.0, 2.0]), np.float64(0)), [3 / 12.5**0.5, 8 / 12.5**0.5]
    )
    np.testing.assert_allclose(silu(np.array([0.0, np.log(3)])), [0, np.log(3) * 0.75])
    assert np.abs(silu(np.array([-1000.0], np.float32)))[0] == 0


def test_gelu_is_close_to_the_normal_distribution_function():
    # The tanh form approximates x * Phi(x); Phi(1) = 0.841345, Phi(-2) = 0.022750.
    x = np.array([0.0, 1.0, -2.0, 30.0, -30.0])
    np.testing.assert_allclose(gelu_tanh(x), [0, 0.841345, -0.0455, 30, 0], atol=4e-4)
    assert gelu_tanh(np.ones(1, np.float32)).dtype == np.float32


def test_attention_is_causal_and_shares_kv_heads():
    # The head dimension is 1, so that the scale is 1. The logit of key s is ln(s + 1) for both
    # query heads.
    k = np.log([[[1.0], [2.0], [3.0]]])
    v = np.array([[[10.0], [20.0], [40.0]]])
    out = attention(np.ones((2, 3, 1)), k, v)
    expected = [10, (10 + 2 * 20) / 3, (10 + 2 * 20 + 3 * 40) / 6]
    np.testing.assert_allclose(out[:, :, 0], [expected, expected])


def test_attention_scales_by_the_root_of_the_head_dimension():
    q = np.full((1, 2, 4), 1.0)
    k = np.zeros((1, 2, 4))
    k[0, 1] = np.log(3) / 2  # q.k = 2 ln 3, over sqrt(4): ln 3
    v = np.array([[[0.0] * 4, [1.0] * 4]])
    np.testing.assert_allclose(attention(q, k, v)[0, 1], np.full(4, 0.75))


@pytest.mark.parametrize("tie", [True, False])
def test_precisions_agree_and_greedy_choices_are_clear(tmp_path, tie):
    model = read_llama(write_tiny_checkpoint(tmp_path / "tiny.gguf", tie_word_embeddings=tie))
    ids = [5, 40, 7, 7, 300, 12, 99, 1]
    single, double = forward(model, ids), forward(model, ids, np.float64)
    assert double.logits.dtype == np.float64
    np.testing.assert_allclose(single.logits, double.logits, atol=1e-4)
    second, first = np.sort(single.logits)[-2:]
    assert first - second > 1e-2
    assert single.q[1].shape == (6, 8, 16)
    assert single.k[1].shape == (3, 8, 16)


def test_chunks_of_queries_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((heads, 37, 8)) for heads in (6, 3, 3))
    whole = attention(q, k, v)
    monkeypatch.setattr("tests.oracle.forward.QUERY_CHUNK", 5)
    np.testing.assert_allclose(attention(q, k, v), whole)


def test_context_decides_the_logits(tmp_path):
    model = read_llama(write_tiny_checkpoint(tmp_path / "tiny.gguf"))
    one, other = forward(model, [5, 6, 7]), forward(model, [6, 5, 7])
    assert np.abs(one.logits - other.logits).max() > 1
