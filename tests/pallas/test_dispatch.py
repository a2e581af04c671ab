"""Which implementation is taken: by the device, by what is forced, by what it can take."""

from dataclasses import asdict

import numpy as np
import pytest

from fairkv_jax.pallas import ragged_decode as ops
from fairkv_jax.pallas.ragged_decode.registry import IMPLEMENTATIONS
from fairkv_jax.pallas.ragged_decode.tiles import Device, TritonTile, device_tiles
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
    case = Case.random(1, room=1)
    out = ops.ragged_decode(*case.arrays, backend=backend, device=CPU)
    assert relative_error(out, attend(case)) < 1e-6
    k, v = case.new_tokens(2)
    q, k_pages, v_pages, table, lengths = case.arrays
    out, pool = ops.append_and_decode(
        q, k, v, (k_pages, v_pages), table, lengths, backend=backend, device=CPU
    )
    after = append(case, k, v)
    assert relative_error(out, attend(after)) < 1e-6
    np.testing.assert_array_equal(pool[0], after.k_pages)
    np.testing.assert_array_equal(pool[1], after.v_pages)


def test_what_one_cannot_take_the_next_does() -> None:
    case = Case.random(3, group=17)
    out = ops.ragged_decode(*case.arrays, device=Device("gpu", "NVIDIA H200"))
    assert relative_error(out, attend(case)) < 1e-6


def test_a_forced_backend_says_what_it_cannot_take() -> None:
    case = Case.random(3, group=17)
    with pytest.raises(NotImplementedError, match=r"triton: 17 query heads.*attention_backend"):
        ops.ragged_decode(*case.arrays, backend="triton", device=CPU)


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


def test_a_width_beyond_the_tiles_is_not_taken() -> None:
    with pytest.raises(NotImplementedError, match="head width 512"):
        device_tiles("NVIDIA H200").get("triton", 2, 512)
