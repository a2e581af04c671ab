"""What a program of the Mosaic GPU kernel holds in shared memory, and how pages come there."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from fairkv_jax.pallas.ragged_decode.pieces import Sizes

INTERPRETER: Any = getattr(plgpu, "InterpretGPUParams", None)
"""None where JAX is older than 0.11.2, and so lacks other parts that the kernel needs."""
_DTYPES = ("bfloat16", "float16")
_ROWS = 64  # of wgmma
_COLUMNS = 8  # wgmma takes a multiple of it
_SWIZZLE = 128  # bytes; TMA and wgmma agree on where a tile's rows lie in shared memory
TILE_COLUMNS = 64
"""Of 16 bits: the width of a swizzled tile."""
_SHARED_BYTES = 227 * 1024  # of a program on Hopper


@dataclass(frozen=True)
class Shapes:
    """What the kernel is made of."""

    sizes: Sizes
    dtype: Any

    @classmethod
    def of(cls, sizes: Sizes, dtype: Any) -> "Shapes":
        """Raises NotImplementedError where the kernel cannot take these sizes."""
        shapes, block = cls(sizes, dtype), sizes.tile.block_tokens
        if INTERPRETER is None:
            raise NotImplementedError(f"needs JAX 0.11.2 or newer, this is {jax.__version__}")
        if dtype.name not in _DTYPES:
            raise NotImplementedError(f"queries and pages of {dtype}, not one of {_DTYPES}")
        if sizes.width % _ROWS:
            raise NotImplementedError(f"head width {sizes.width}, not a multiple of {_ROWS}")
        if block % _ROWS:
            raise NotImplementedError(f"blocks of {block} tokens, not a multiple of {_ROWS}")
        if sizes.page_size % 8 or (block % sizes.page_size and sizes.page_size % block):
            raise NotImplementedError(
                f"pages of {sizes.page_size} tokens: they must be a multiple of 8, and divide a "
                f"block of {block} or be a multiple of it"
            )
        if shapes.shared_bytes > _SHARED_BYTES:
            raise NotImplementedError(
                f"{shapes.shared_bytes} bytes of shared memory, there are {_SHARED_BYTES}"
            )
        return shapes

    @property
    def columns(self) -> int:
        """The group, padded."""
        return _COLUMNS * pl.cdiv(self.sizes.group, _COLUMNS)

    @property
    def copy_tokens(self) -> int:
        """A page, or as much of a larger one as a block takes."""
        return min(self.sizes.page_size, self.sizes.tile.block_tokens)

    @property
    def copies(self) -> int:
        """Of keys, and as many of values, a block."""
        return self.sizes.tile.block_tokens // self.copy_tokens

    @property
    def outputs(self) -> list[jax.ShapeDtypeStruct]:
        """Of every piece and column: the unnormalised output, the peak, the mass."""
        scalar = jax.ShapeDtypeStruct((self.sizes.pieces, self.columns), jnp.float32)
        return [jax.ShapeDtypeStruct((*scalar.shape, self.sizes.width), jnp.float32)] + [scalar] * 2

    @property
    def buffers(self) -> dict[str, Any]:
        """Shared memory and barriers, by the name of `Buffers`' field."""
        tile, width = self.sizes.tile, self.sizes.width
        cached = _shared((tile.num_stages, tile.block_tokens, width), self.dtype)
        landed = plgpu.Barrier(num_arrivals=self.copies, num_barriers=tile.num_stages)
        scalar = plgpu.SMEM((self.columns,), jnp.float32)
        return {
            "q": _shared((self.columns, width), self.dtype),
            "k": cached,
            "v": cached,
            "weights": _shared((self.columns, tile.block_tokens), self.dtype),
            "output": _shared((self.columns, width), jnp.float32),
            "peak": scalar,
            "mass": scalar,
            "q_landed": plgpu.Barrier(),
            "k_landed": landed,
            "v_landed": landed,
        }

    @property
    def shared_bytes(self) -> int:
        """Of a program, with what Mosaic takes for reductions and barriers."""
        tile, columns, width = self.sizes.tile, self.columns, self.sizes.width
        cached = 2 * tile.num_stages * tile.block_tokens * width
        items = cached + columns * (width + tile.block_tokens)
        return items * self.dtype.itemsize + 4 * columns * (width + 2) + 4096


@dataclass(frozen=True)
class Buffers:
    """A program's shared memory and barriers."""

    q: Any
    k: Any
    v: Any
    weights: Any
    output: Any
    peak: Any
    mass: Any
    q_landed: Any
    k_landed: Any
    v_landed: Any


@dataclass(frozen=True)
class Work:
    """One program's piece, what it reads, and where."""

    shapes: Shapes
    buffers: Buffers
    k_ref: Any
    v_ref: Any
    table_ref: Any
    pair: Array
    begin: Array
    end: Array
    length: Array

    def stage(self, tile: Array) -> Array:
        return jax.lax.rem(tile - self.begin, jnp.int32(self.shapes.sizes.tile.num_stages))

    def pages(self, tile: Array) -> list[Array]:
        """Of a tile; behind the length, where the table holds nothing, the pair's last one."""
        page_size = self.shapes.sizes.page_size
        last = jax.lax.div(self.length - 1, jnp.int32(page_size))
        first = tile * self.shapes.sizes.tile.block_tokens
        tokens = [first + i * self.shapes.copy_tokens for i in range(self.shapes.copies)]
        at = [jax.lax.div(token, jnp.int32(page_size)) for token in tokens]
        return [self.table_ref[self.pair, jnp.minimum(page, last)] for page in at]

    def fetch(self, tile: Array, pages: list[Array]) -> None:
        """Starts the copies of a tile's keys and values into its stage."""
        stage, tokens = self.stage(tile), self.shapes.copy_tokens
        block = self.shapes.sizes.tile.block_tokens
        begin = jax.lax.rem(tile * block, jnp.int32(self.shapes.sizes.page_size))
        part = pl.ds(pl.multiple_of(begin, 8), tokens) if self.shapes.copies == 1 else slice(None)
        smem = self.buffers
        keys, values = (self.k_ref, smem.k, smem.k_landed), (self.v_ref, smem.v, smem.v_landed)
        for ref, buffer, landed in (keys, values):
            for i, page in enumerate(pages):
                place = buffer.at[stage, pl.ds(i * tokens, tokens)]
                plgpu.copy_gmem_to_smem(ref.at[page, part], place, landed.at[stage])


def _shared(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory laid out as wgmma and TMA take it: 8 rows x 128 bytes, swizzled."""
    layout: Any = plgpu
    tiling = layout.TilingTransform((8, _SWIZZLE // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, layout.SwizzleTransform(_SWIZZLE)))
