"""KVzip's replays and scores in tiny cases, worked out by hand."""

import numpy as np

from tests.oracle.kvzip import FIRST, LATER, chunk_scores, kept_positions, replays
from tests.oracle.test_scorers import make_layer

TEXTS = {FIRST: [901], LATER: [902], "\n": [903]}


def test_replays_repeat_chunk_by_chunk():
    prompt = list(range(25))
    parts = replays(prompt, TEXTS.__getitem__, chunk_tokens=10)
    assert [(part.start, part.stop) for part in parts] == [(0, 10), (10, 20), (20, 25)]
    assert parts[0].token_ids == [901, 903, *range(10)]
    assert parts[1].token_ids == [902, *range(2, 10), 903, *range(10, 20)]
    assert parts[2].token_ids == [902, *range(12, 20), 903, *range(20, 25)]
    (whole,) = replays(prompt, TEXTS.__getitem__, prefix_tokens=5)
    assert (whole.start, whole.stop) == (5, 25)
    assert whole.token_ids == [901, 903, *range(5, 25)]


def make_weights(weights: list[float], **arrays):
    """Keys whose weights every query sees in proportion, in one head of two dimensions."""
    k = np.log(weights)[None, :, None] * [1, 0]
    q = np.full(k.shape, np.sqrt(2)) * [1, 0]
    return make_layer(k=k, q=q, **arrays)


def test_scores_are_the_largest_attention_over_a_part_of_the_keys():
    # T = 3 and two replayed queries; the later one sees one more key.
    layer = make_weights([1, 2, 3, 4, 5])
    np.testing.assert_allclose(chunk_scores(layer, 3, 0, 3, plus=False), [[0.1, 0.2, 0.3]])
    # Tokens 5 and 6 are the chunk, 4 is before it and not a sink: the sinks weigh 4.
    layer = make_weights([1, 1, 1, 1, 99, 2, 3, 1])
    np.testing.assert_allclose(chunk_scores(layer, 7, 5, 7, plus=False), [[0.2, 0.3]])


def test_plus_weighs_by_what_the_value_writes_and_the_input_of_the_query():
    # Two replayed queries; the second one's input is a tenth as long, so that it wins although it
    # sees more keys.
    layer = make_weights(
        [1, 2, 1, 4],
        v=[[[1, 0], [0, 1], [0, 0], [0, 0]]],
        w_o=[[[3, 4], [0, 1]]],
        h=[[9.0], [9.0], [1.0], [0.1]],
    )
    np.testing.assert_allclose(
        chunk_scores(layer, 2, 0, 2, plus=True), [[1 / 8 * 5 / 0.1, 2 / 8 * 1 / 0.1]]
    )


def test_the_removed_pairs_are_rounded_down():
    scores = np.array([[[np.inf, 0.3, 0.1]], [[np.inf, 0.2, 0.4]]])
    kept = kept_positions(scores, 0.5)  # int(6 * 0.5) = 3
    assert [[head.tolist() for head in layer] for layer in kept] == [[[0]], [[0, 2]]]
    kept = kept_positions(scores, 0.49)  # int(2.94) = 2
    assert [[head.tolist() for head in layer] for layer in kept] == [[[0, 1]], [[0, 2]]]
