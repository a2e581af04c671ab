"""The Mosaic GPU kernel, interpreted on CPU, against float64 NumPy.

JAX's interpreter simulates the TMA copies, the barriers and wgmma. A call takes seconds, so there
are few cases, each with all lengths at the edges. It cannot show the time, the layout of registers,
nor a missing wait, because its copies are complete as soon as they start.
"""

from functools import partial
from typing import Any

import jax
import pytest

from fairkv_jax.pallas.ragged_decode import mosaic
from fairkv_jax.pallas.ragged_decode.mosaic_pipeline import INTERPRETER
from fairkv_jax.pallas.ragged_decode.tiles import MosaicTile
from tests.pallas.oracle import Case, attend, relative_error

TOLERANCE = {"float16": 2e-3, "bfloat16": 1e-2}
TILE = MosaicTile(block_tokens=64, num_stages=2, programs=9, min_blocks=1)
# Blocks of several pages, of one and of half a one; more tiles a piece than stages; both paddings.
SHAPES: list[tuple[MosaicTile, dict[str, Any]]] = [
    (TILE, {"group": 3, "head_dim": 64, "max_pages": 20}),
    (MosaicTile(128, 2, 2, 1), {"group": 8, "head_dim": 64, "page_size": 8, "max_pages": 90}),
    (MosaicTile(64, 3, 1, 1), {"group": 16, "head_dim": 128, "page_size": 64, "dtype": "float16"}),
    (TILE, {"group": 4, "head_dim": 256, "page_size": 128, "max_pages": 2}),
]

pytestmark = pytest.mark.skipif(
    INTERPRETER is None, reason="this JAX cannot interpret Mosaic GPU kernels"
)


def case_of(seed: int, shape: dict[str, Any]) -> Case:
    return Case.random(seed, **{"batch": 3, "slots": 2, "dtype": "bfloat16"} | shape)


@pytest.mark.parametrize(
    ("tile", "shape", "int8"),
    [*((*each, False) for each in SHAPES), (*SHAPES[1], True), (*SHAPES[3], True)],
    ids=str,
)
def test_decode_agrees_with_float64(tile: MosaicTile, shape: dict[str, Any], *, int8: bool) -> None:
    case = case_of(1, shape)
    if int8:
        case = case.quantized()
    out = jax.jit(partial(mosaic.ragged_decode, tile=tile, interpret=True))(*case.arrays)
    assert out.dtype == case.q.dtype
    assert relative_error(out, attend(case)) < TOLERANCE[case.q.dtype.name]


@pytest.mark.parametrize(
    ("shape", "tile", "reason"),
    [
        ({"dtype": "float32"}, TILE, "float32"),
        ({"head_dim": 96}, TILE, "head_dim 96, not a multiple of 64"),
        ({"page_size": 24}, TILE, "pages of 24 tokens"),
        ({"group": 17}, TILE, "17 query heads"),
        ({"head_dim": 256}, MosaicTile(64, 4, 9, 1), "bytes of shared memory"),
    ],
)
def test_inputs_that_it_cannot_take_are_named(
    shape: dict[str, Any], tile: MosaicTile, reason: str
) -> None:
    case = case_of(7, {"group": 4, "head_dim": 64} | shape)
    with pytest.raises(NotImplementedError, match=reason):
        mosaic.ragged_decode(*case.arrays, tile=tile, interpret=True)
