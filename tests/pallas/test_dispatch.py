"""Which implementation is taken: by the device, by what is forced, by what it can take."""

from dataclasses import asdict

import numpy as np
import pytest

from fairkv_jax.pallas import ragged_decode as ops
from fairkv_jax.pallas.ragged_decode.mosaic_pipeline import INTERPRETER, Shapes
from fairkv_jax.pallas.ragged_decode.pieces import Sizes
from fairkv_jax.pallas.ragged_decode.registry import IMPLEMENTATIONS
from fairkv_jax.pallas.ragged_decode.tiles import Device, MosaicTile, TritonTile, device_tiles
from tests.pallas.oracle import Case, append, attend, relative_error

CPU = Device("cpu", "cpu")
KINDS = {
    "NVIDIA A100-SXM4-80GB": "A100",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H200": "H200",
    "NVIDIA L4": "L4",
}


@pytest.mark.parametrize("backend", ops.BACKENDS)
def test_every_backend_computes_the_same(backend: str) -> None:
    if backend == "mosaic" and INTERPRETER is None:
        pytest.skip("this JAX cannot interpret Mosaic GPU kernels")
    case = Case.random(1, room=1, group=2, width=64, dtype="bfloat16")
    out = ops.ragged_decode(*case.arrays, backend=backend, device=CPU)
    assert relative_error(out, attend(case)) < 1e-2
    k, v = case.new_tokens(2)
    q, k_pages, v_pages, table, lengths = case.arrays
    out, pool = ops.append_and_decode(
        q, k, v, (k_pages, v_pages), table, lengths, backend=backend, device=CPU
    )
    after = append(case, k, v)
    assert relative_error(out, attend(after)) < 1e-2
    for pages, expected in zip(pool, (after.k_pages, after.v_pages), strict=True):
        # As float32: NumPy knows no NaN in bfloat16.
        np.testing.assert_array_equal(
            np.asarray(pages, np.float32), np.asarray(expected, np.float32)
        )


def test_what_one_cannot_take_the_next_does() -> None:
    case = Case.random(3, group=17)
    out = ops.ragged_decode(*case.arrays, device=Device("gpu", "NVIDIA H200"))
    assert relative_error(out, attend(case)) < 1e-6


def test_a_forced_backend_says_what_it_cannot_take() -> None:
    case = Case.random(3, group=17)
    with pytest.raises(NotImplementedError, match=r"triton: 17 query heads.*attention_backend"):
        ops.ragged_decode(*case.arrays, backend="triton", device=CPU)


def test_shapes_that_do_not_fit_are_refused() -> None:
    q, k_pages, v_pages, page_table, lengths = Case.random(3).arrays
    for table, counts in ((page_table, lengths.T), (page_table[:-1], lengths)):
        with pytest.raises(ValueError, match=r"shapes do not fit.*lengths \[B,C\]"):
            ops.ragged_decode(q, k_pages, v_pages, table, counts, device=CPU)
    with pytest.raises(ValueError, match="shapes do not fit"):
        ops.ragged_decode(q[..., :32], k_pages, v_pages, page_table, lengths, device=CPU)


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match=r"attention_backend must be one of auto, .*'cuda'"):
        ops.check_backend("cuda")


@pytest.mark.parametrize(("kind", "match"), KINDS.items())
def test_a_device_finds_its_own_tiles(kind: str, match: str) -> None:
    assert device_tiles(kind).match == match


def test_an_unlisted_device_gets_the_default() -> None:
    assert device_tiles("NVIDIA GeForce RTX 4090") == device_tiles("some other device")


@pytest.mark.parametrize("kind", [*KINDS, "some other device"])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("width", [64, 96, 128, 256])
def test_tiles_are_whole(kind: str, itemsize: int, width: int) -> None:
    tiles = device_tiles(kind)
    assert set(tiles.order) <= set(IMPLEMENTATIONS)
    tile = TritonTile(**tiles.get("triton", itemsize, width))
    assert min(asdict(tile).values()) > 0
    assert tile.block_tokens >= 16
    assert tile.block_tokens.bit_count() == 1


@pytest.mark.parametrize("kind", ["NVIDIA H100 80GB HBM3", "NVIDIA H200"])
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("group", [1, 16])
def test_mosaic_tiles_fit_a_hopper(kind: str, width: int, group: int) -> None:
    tile = MosaicTile(**device_tiles(kind).get("mosaic", 2, width))
    sizes = Sizes(64, group, width, page_size=16, max_pages=64, tile=tile)
    if INTERPRETER is None:
        pytest.skip("this JAX is too old for the kernel")
    Shapes.of(sizes, np.dtype("float16"))


@pytest.mark.parametrize("kind", ["NVIDIA A100-SXM4-80GB", "NVIDIA L4", "NVIDIA B200"])
def test_mosaic_is_for_hopper_alone(kind: str) -> None:
    """Lowering its kernel for another architecture would abort the process."""
    case = Case.random(3, group=2, width=64, dtype="bfloat16")
    with pytest.raises(NotImplementedError, match="no mosaic tile"):
        ops.ragged_decode(*case.arrays, backend="mosaic", device=Device("gpu", kind))


def test_a_width_beyond_the_tiles_is_not_taken() -> None:
    with pytest.raises(NotImplementedError, match="head width 512"):
        device_tiles("NVIDIA H200").get("triton", 2, 512)
