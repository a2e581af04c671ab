"""The scores of tiny cases, worked out by hand."""

import numpy as np
import pytest

from tests.oracle.forward import Layer, rope_frequencies, rotate
from tests.oracle.scorers import (
    critical,
    expected_attention,
    keydiff,
    knorm,
    mean_rotation,
    output_norms,
    tova,
)


def make_layer(**arrays) -> Layer:
    """A layer of zeros but for these arrays, of the sizes of `k` [K, T, H]."""
    K, T, H = np.shape(arrays.get("k", np.zeros((1, 1, 2))))
    zeros = {
        "q": np.zeros((K, T, H)),
        "k": np.zeros((K, T, H)),
        "v": np.zeros((K, T, H)),
        "q_unrotated": np.zeros((K, T, H)),
        "h": np.zeros((T, 1)),
        "w_o": np.zeros((K, H, 1)),
        "frequencies": np.zeros(H // 2),
    }
    return Layer(**zeros | {name: np.array(value, float) for name, value in arrays.items()})


def test_the_mean_rotation_is_the_mean_of_ropes():
    frequencies = rope_frequencies(4, 100.0, np.array([1.0, 2.0]))
    positions = np.arange(7, 10)
    x = np.random.default_rng(0).standard_normal(4)
    angles = positions[:, None] * frequencies
    turned = rotate(np.tile(x, (1, 3, 1)), np.cos(angles), np.sin(angles))
    np.testing.assert_allclose(mean_rotation(frequencies, positions) @ x, turned[0].mean(axis=0))
    # A quarter turn and a half turn of one pair: the mean of (0, 1) and (-1, 0).
    quarter = mean_rotation(np.array([np.pi / 2]), np.array([1, 2]))
    np.testing.assert_allclose(quarter @ [1, 0], [-0.5, 0.5], atol=1e-15)


def test_expected_attention_of_constant_queries_is_their_attention():
    # RoPE turns nothing, and all queries are alike but for the sinks', which do not count.
    keys = [[[0, 0]] * 4 + [[np.log(2), 0], [0, 5]]]
    values = [[[0, 0]] * 4 + [[3, 4], [0, 1]]]
    queries = [[[9, 9]] * 4 + [[np.sqrt(2), 0]] * 2]
    layer = make_layer(k=keys, v=values, q_unrotated=queries)
    # Logits log 2 and 0: probabilities 2/3 and 1/3; values of lengths 5 and 1.
    scores = expected_attention(layer, epsilon=0.1)
    np.testing.assert_allclose(scores[0, 4:], [(2 / 3 + 0.1) * 5, 1 / 3 + 0.1])
    assert np.isinf(scores[0, :4]).all()
    plain = expected_attention(layer, use_norms=False)
    np.testing.assert_allclose(plain[0, 4:], [2 / 3, 1 / 3])


def test_expected_attention_counts_half_the_variance():
    # Queries 3 and -3 along the first axis: mean 0, variance 9. Logits k^2 * 9 / (2 * 2).
    size = np.sqrt(np.log(2) * 4 / 9)
    keys = [[[0, 0]] * 4 + [[size, 0], [0, 7]]]
    layer = make_layer(k=keys, q_unrotated=[[[0, 0]] * 4 + [[3, 0], [-3, 0]]])
    np.testing.assert_allclose(expected_attention(layer, use_norms=False)[0, 4:], [2 / 3, 1 / 3])


def test_expected_attention_turns_the_queries_to_the_positions_after_the_prompt():
    # T = 6. A quarter turn per position; one future position, 6, is a half turn: keys that point
    # against the queries win.
    keys = [[[0, 0]] * 4 + [[-np.log(2), 0], [np.log(2), 0]]]
    queries = [[[0, 0]] * 4 + [[np.sqrt(2), 0]] * 2]
    layer = make_layer(k=keys, q_unrotated=queries, frequencies=[np.pi / 2])
    scores = expected_attention(layer, num_future=1, use_norms=False)
    np.testing.assert_allclose(scores[0, 4:], [4 / 5, 1 / 5])


def test_expected_attention_is_averaged_over_the_group():
    keys = [[[0, 0]] * 4 + [[np.log(2), 0], [0, 0]]]
    queries = [[[np.sqrt(2), 0]] * 6, [[-np.sqrt(2), 0]] * 6]
    layer = make_layer(k=keys, q=queries, q_unrotated=queries)
    scores = expected_attention(layer, use_norms=False)
    np.testing.assert_allclose(scores[0, 4:], [1 / 2, 1 / 2])


def test_keydiff_scores_directions_not_lengths():
    layer = make_layer(k=[[[5, 0], [1, 0], [0, 1], [0, 9]], [[1, 0], [1, 0], [1, 0], [-2, 0]]])
    half = np.sqrt(0.5)
    np.testing.assert_allclose(keydiff(layer), [[-half] * 4, [-1, -1, -1, 1]])


def test_knorm_prefers_short_keys():
    np.testing.assert_allclose(knorm(make_layer(k=[[[3, 4], [1, 0]]])), [[-5, -1]])


def test_tova_is_the_mean_of_all_heads_and_keeps_the_last_token():
    # Weights 1 2 | 1 for head 0 and 4 1 | 5 for head 1; only the last queries are not zero.
    k = np.log([[1, 2, 1], [4, 1, 5]])[:, :, None] * [1, 0]
    q = np.zeros((2, 3, 2))
    q[:, -1, 0] = np.sqrt(2)
    scores = tova(make_layer(k=k, q=q))
    np.testing.assert_allclose(scores[:, :2], [[(1 / 4 + 4 / 10) / 2, (2 / 4 + 1 / 10) / 2]] * 2)
    assert np.isinf(scores[:, 2]).all()


def test_output_norms_and_the_critical_ranking():
    layer = make_layer(
        k=np.zeros((1, 2, 2)),
        q=np.zeros((2, 2, 2)),
        v=[[[1, 2], [0, 1]]],
        # Query head 0 writes (3 v0, -4 v0), query head 1 (v1, 0).
        w_o=[[[3, -4], [0, 0]], [[0, 0], [1, 0]]],
    )
    np.testing.assert_allclose(output_norms(layer), [[7, 0], [2, 1]])
    np.testing.assert_allclose(output_norms(layer, order=2), [[5, 0], [2, 1]])
    scores = critical(layer, np.array([[0.5, np.inf]]))
    np.testing.assert_allclose(scores, [[0.5001 * 4.5, np.inf]])


@pytest.mark.parametrize("score", [expected_attention, keydiff, knorm, tova])
def test_random_scores_have_the_shape_of_the_keys(score):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape, dtype=np.float32)  # noqa: E731
    layer = Layer(
        draw(6, 9, 4), draw(3, 9, 4), draw(3, 9, 4), draw(6, 9, 4), draw(9, 5), draw(6, 4, 5),
        rope_frequencies(4, 100.0),
    )  # fmt: skip
    scores = score(layer)
    assert scores.shape == (3, 9)
    assert scores.dtype == np.float32
