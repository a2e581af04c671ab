"""Work is cut so that every tile is in exactly one piece and no piece is larger than a share."""

import jax.numpy as jnp
import numpy as np
import pytest

from fairkv_jax.pallas.ragged_decode.pieces import Sizes, list_pieces
from fairkv_jax.pallas.ragged_decode.tiles import Tile

BLOCK = 16


def cut(lengths: np.ndarray, tile: Tile) -> np.ndarray:
    """The pieces of the second of two layers; the first one is full of other work."""
    entries = lengths.size + int((-(-lengths // 8)).sum())
    sizes = Sizes(lengths.size, 4, 64, page_size=8, num_entries=entries, tile=tile)
    both = jnp.asarray([np.full(lengths.size, 999), lengths], jnp.int32)
    starts = jnp.asarray([np.full(lengths.size, -1), 3 * np.arange(lengths.size)], jnp.int32)
    pieces = list_pieces(both, starts, jnp.array([1]), sizes, interpret=True)
    assert len(pieces) == sizes.pieces
    return np.asarray(pieces)


@pytest.mark.parametrize("programs", [1, 7, 200])
@pytest.mark.parametrize("min_blocks", [1, 3])
def test_every_tile_is_in_one_piece(programs: int, min_blocks: int) -> None:
    rng = np.random.default_rng(programs)
    lengths = rng.integers(0, 700, 37) * (rng.random(37) < 0.7)
    pieces = cut(lengths, Tile(BLOCK, 2, programs, min_blocks))
    work = pieces[pieces[:, 1] < pieces[:, 2]]
    expected = [(pair, tile) for pair, n in enumerate(lengths) for tile in range(-(-n // BLOCK))]
    assert [(pair, t) for pair, begin, end, *_ in work for t in range(begin, end)] == expected
    assert (work[:, 3] == lengths[work[:, 0]]).all()
    assert (work[:, 4] == 3 * work[:, 0]).all()
    # As many tiles as an equal share, or as the least that is worth a program.
    share = max(min_blocks, -(-len(expected) // programs))
    assert (work[:, 2] - work[:, 1]).max() <= share


def test_a_layer_without_tokens_has_no_work() -> None:
    pieces = cut(np.zeros(5, int), Tile(BLOCK, 2, 8, 1))
    assert (pieces[:, 1] == pieces[:, 2]).all()
