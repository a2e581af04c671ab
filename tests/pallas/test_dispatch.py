"""Which implementation dispatch takes, by device, by request and by what each can take."""

from dataclasses import asdict
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from fairkv_jax.pallas import ragged_decode as ops
from fairkv_jax.pallas.ragged_decode import PageTable, Pool
from fairkv_jax.pallas.ragged_decode.mosaic_pipeline import INTERPRETER, Shapes
from fairkv_jax.pallas.ragged_decode.pieces import Sizes
from fairkv_jax.pallas.ragged_decode.registry import IMPLEMENTATIONS
from fairkv_jax.pallas.ragged_decode.tiles import Device, MosaicTile, TritonTile, device_tiles
from tests.pallas.oracle import Case, attend, relative_error

CPU = Device("cpu", "cpu")
KINDS = {
    "NVIDIA A100-SXM4-80GB": "A100",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H200": "H200",
    "NVIDIA L4": "L4",
    "NVIDIA L40": "L40",
    "NVIDIA L40S": "L40",
    "NVIDIA GH200 480GB": "H200",
}


@pytest.mark.parametrize("shape", [{"group": 17}, {"num_queries": 2}], ids=str)
def test_the_next_backend_takes_what_one_cannot(shape: dict[str, Any]) -> None:
    case = Case.random(3, **shape)
    out = ops.ragged_decode(*case.arrays, device=Device("gpu", "NVIDIA H200"))
    assert relative_error(out, attend(case)) < 1e-6


def test_a_forced_backend_says_why_it_cannot_take_an_input() -> None:
    case = Case.random(3, group=17)
    with pytest.raises(NotImplementedError, match=r"triton: 17 query heads.*attention_backend"):
        ops.ragged_decode(*case.arrays, backend="triton", device=CPU)


def test_shapes_that_do_not_fit_are_refused() -> None:
    q, k_pages, v_pages, page_table, lengths, _ = Case.random(3).arrays
    pages, starts = page_table.pages, page_table.starts
    bad_tables = [
        (page_table, lengths.T),
        (PageTable(pages, starts[:-1]), lengths),
        (PageTable(pages[:0], starts), lengths),
        (PageTable(pages, starts[None]), lengths[None]),
    ]
    for table, counts in bad_tables:
        with pytest.raises(ValueError, match=r"shapes do not fit.*lengths \[B,C\]"):
            ops.ragged_decode(q, k_pages, v_pages, table, counts, device=CPU)
    with pytest.raises(ValueError, match=r"starts \[L,B,C\]"):
        ops.ragged_decode(q, k_pages, v_pages, page_table, lengths, 0, device=CPU)
    for queries in (q[..., :32], q[:, 0]):
        with pytest.raises(ValueError, match="shapes do not fit"):
            ops.ragged_decode(queries, k_pages, v_pages, page_table, lengths, device=CPU)
    (k, v), pool = Case.random(3).new_tokens(1), Pool(k_pages, v_pages)
    with pytest.raises(ValueError, match="new keys"):
        ops.append_and_decode(q, k[:, 0], v, pool, page_table, lengths, device=CPU)


def test_int8_pages_and_scales_go_together() -> None:
    *_, page_table, lengths, _ = Case.random(3).arrays
    q, k_pages, v_pages = Case.random(3).arrays[:3]
    scales = jnp.ones(k_pages.shape[:2]), jnp.ones(k_pages.shape[:2])
    args = page_table, lengths
    int8 = k_pages.astype(jnp.int8), v_pages.astype(jnp.int8)
    with pytest.raises(ValueError, match="int8 with no scales"):
        ops.ragged_decode(q, *int8, *args, device=CPU)
    with pytest.raises(ValueError, match="pages of float32 with scales"):
        ops.ragged_decode(q, k_pages, v_pages, *args, scales=scales, device=CPU)
    with pytest.raises(ValueError, match="scale per token"):
        ops.ragged_decode(q, *int8, *args, scales=(scales[0], scales[1][:, :1]), device=CPU)


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
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_tiles_are_whole(kind: str, itemsize: int, head_dim: int) -> None:
    tiles = device_tiles(kind)
    assert set(tiles.order) <= set(IMPLEMENTATIONS)
    tile = TritonTile(**tiles.get("triton", itemsize, head_dim))
    assert min(asdict(tile).values()) > 0
    assert tile.block_tokens >= 16
    assert tile.block_tokens.bit_count() == 1


@pytest.mark.parametrize("kind", ["NVIDIA H100 80GB HBM3", "NVIDIA H200"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("group", [1, 16])
def test_mosaic_tiles_fit_a_hopper(kind: str, head_dim: int, group: int) -> None:
    tile = MosaicTile(**device_tiles(kind).get("mosaic", 2, head_dim))
    sizes = Sizes(64, group, head_dim, page_size=16, num_entries=4096, tile=tile)
    if INTERPRETER is None:
        pytest.skip("this JAX is too old for the kernel")
    for page_dtype in ("float16", "int8"):
        Shapes.of(sizes, np.dtype("float16"), np.dtype(page_dtype))


@pytest.mark.parametrize("kind", ["NVIDIA A100-SXM4-80GB", "NVIDIA L4", "NVIDIA B200"])
def test_mosaic_is_for_hopper_alone(kind: str) -> None:
    """Lowering its kernel for another architecture would abort the process."""
    case = Case.random(3, group=2, head_dim=64, dtype="bfloat16")
    with pytest.raises(NotImplementedError, match="no mosaic tile"):
        ops.ragged_decode(*case.arrays, backend="mosaic", device=Device("gpu", kind))


def test_a_head_dim_beyond_the_tiles_is_not_taken() -> None:
    with pytest.raises(NotImplementedError, match="head_dim 512"):
        device_tiles("NVIDIA H200").get("triton", 2, 512)
