"""The shared memory of a program of the Mosaic GPU kernel, and the copies of pages into it."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from fairkv_jax.pallas.ragged_decode.pieces import Sizes

INTERPRETER: Any = getattr(plgpu, "InterpretGPUParams", None)
"""None where JAX is older than 0.11.2, which lacks other parts that the kernel needs too."""
_DTYPES = ("bfloat16", "float16")
_ROWS = 64  # of wgmma
_COLUMNS = 8  # wgmma takes a multiple of it
_SWIZZLE = 128  # bytes, at most; TMA and wgmma agree on where a tile's rows lie in shared memory
_SHARED_BYTES = 227 * 1024  # the most that a program may use on Hopper


@dataclass(frozen=True)
class Shapes:
    """The shapes of the kernel's outputs and buffers."""

    sizes: Sizes
    dtype: Any
    """The type of the queries, in which wgmma multiplies."""
    page_dtype: Any
    """The same, or int8."""

    @classmethod
    def of(cls, sizes: Sizes, dtype: Any, page_dtype: Any) -> "Shapes":
        """Raises NotImplementedError where the kernel cannot take these sizes."""
        shapes, block = cls(sizes, dtype, page_dtype), sizes.tile.block_tokens
        if INTERPRETER is None:
            raise NotImplementedError(f"needs JAX 0.11.2 or newer, this is {jax.__version__}")
        if dtype.name not in _DTYPES:
            raise NotImplementedError(f"queries and pages of {dtype}, not one of {_DTYPES}")
        if sizes.head_dim % _ROWS:
            raise NotImplementedError(f"head_dim {sizes.head_dim}, not a multiple of {_ROWS}")
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
    def is_quantized(self) -> bool:
        return self.page_dtype != self.dtype

    @property
    def columns(self) -> int:
        """The group, padded to what wgmma takes."""
        return _COLUMNS * pl.cdiv(self.sizes.group, _COLUMNS)

    @property
    def copy_tokens(self) -> int:
        """Tokens of one copy: a page, or the part of a larger page that a block takes."""
        return min(self.sizes.page_size, self.sizes.tile.block_tokens)

    @property
    def copies(self) -> int:
        """Copies of keys per block; there are as many of values."""
        return self.sizes.tile.block_tokens // self.copy_tokens

    @property
    def outputs(self) -> list[jax.ShapeDtypeStruct]:
        """`acc`, `m` and `l` of every piece and column."""
        scalar = jax.ShapeDtypeStruct((self.sizes.pieces, self.columns), jnp.float32)
        return [jax.ShapeDtypeStruct((*scalar.shape, self.sizes.head_dim), jnp.float32)] + [
            scalar
        ] * 2

    @property
    def buffers(self) -> dict[str, Any]:
        """Shared memory and barriers, by the names of the fields of `Buffers`."""
        tile, head_dim = self.sizes.tile, self.sizes.head_dim
        cached = _shared((tile.num_stages, tile.block_tokens, head_dim), self.page_dtype)
        wide = {"wide": _shared((tile.block_tokens, head_dim), self.dtype)}
        landed = plgpu.Barrier(num_arrivals=self.copies, num_barriers=tile.num_stages)
        scalar = plgpu.SMEM((self.columns,), jnp.float32)
        return {
            "q": _shared((self.columns, head_dim), self.dtype),
            "k": cached,
            "v": cached,
            "weights": _shared((self.columns, tile.block_tokens), self.dtype),
            "acc": _shared((self.columns, head_dim), jnp.float32),
            "m": scalar,
            "l": scalar,
            "q_landed": plgpu.Barrier(),
            "k_landed": landed,
            "v_landed": landed,
            **(wide if self.is_quantized else {}),
        }

    @property
    def shared_bytes(self) -> int:
        """Bytes of a program, with those that Mosaic takes for reductions and barriers."""
        tile, columns, head_dim = self.sizes.tile, self.columns, self.sizes.head_dim
        block = tile.block_tokens * head_dim
        cached = 2 * tile.num_stages * block * self.page_dtype.itemsize
        items = columns * (head_dim + tile.block_tokens) + block * self.is_quantized
        return cached + items * self.dtype.itemsize + 4 * columns * (head_dim + 2) + 4096


@dataclass(frozen=True)
class Buffers:
    """The shared memory and barriers of a program."""

    q: Any
    k: Any
    v: Any
    weights: Any
    acc: Any
    m: Any
    l: Any
    q_landed: Any
    k_landed: Any
    v_landed: Any
    wide: Any = None
    """The keys or the values of one int8 tile in the type of the queries."""


@dataclass(frozen=True)
class Work:
    """The piece of one program, and the arrays that it reads."""

    shapes: Shapes
    buffers: Buffers
    k_ref: Any
    v_ref: Any
    k_scales_ref: Any
    v_scales_ref: Any
    """None where the pages are not int8."""
    pages_ref: Any
    start: Array
    """Where the pair's entries begin in the list of pages."""
    begin: Array
    end: Array
    """The first tile of the piece and the first one after it."""
    length: Array
    """Tokens of the pair."""

    def stage(self, tile: Array) -> Array:
        """The stage of shared memory that a tile is copied to."""
        return jax.lax.rem(tile - self.begin, jnp.int32(self.shapes.sizes.tile.num_stages))

    def pages(self, tile: Array) -> list[Array]:
        """The pages of a tile; past the length, the pair's last page. Reads stay in the list."""
        page_size = self.shapes.sizes.page_size
        last = jax.lax.div(self.length - 1, jnp.int32(page_size))
        first = tile * self.shapes.sizes.tile.block_tokens
        tokens = [first + i * self.shapes.copy_tokens for i in range(self.shapes.copies)]
        at = [jax.lax.div(token, jnp.int32(page_size)) for token in tokens]
        end = self.shapes.sizes.num_entries - 1
        entries = [jnp.clip(self.start + jnp.minimum(page, last), 0, end) for page in at]
        return [self.pages_ref[entry] for entry in entries]

    def fetch(self, tile: Array, pages: list[Array]) -> None:
        """Starts the copies of a tile's keys and values into its stage."""
        stage, tokens = self.stage(tile), self.shapes.copy_tokens
        begin = self._begin(tile)
        part = pl.ds(pl.multiple_of(begin, 8), tokens) if self.shapes.copies == 1 else slice(None)
        smem = self.buffers
        keys, values = (self.k_ref, smem.k, smem.k_landed), (self.v_ref, smem.v, smem.v_landed)
        for ref, buffer, landed in (keys, values):
            for i, page in enumerate(pages):
                place = buffer.at[stage, pl.ds(i * tokens, tokens)]
                plgpu.copy_gmem_to_smem(ref.at[page, part], place, landed.at[stage])

    def scales(self, scales_ref: Any, tile: Array, shape: tuple[int, int]) -> Array:
        """The scales of a tile's keys or values in float32, one per row of an array of that shape.

        They are read one by one: TMA writes to multiples of 128 bytes, and a page has fewer scales.
        """
        pages, tokens, begin = self.pages(tile), self.shapes.copy_tokens, self._begin(tile)
        rows = plgpu.Layout.WGMMA.reduce(1)
        row = plgpu.broadcasted_iota(jnp.int32, shape[:1], 0, layout=rows)
        scales = plgpu.layout_cast(jnp.zeros(shape[:1], jnp.float32), rows)
        for token in range(shape[0]):
            scale = scales_ref[pages[token // tokens], begin + token % tokens]
            scales = jnp.where(row == token, scale.astype(jnp.float32), scales)
        return jax.lax.broadcast_in_dim(scales, shape, [0])

    def _begin(self, tile: Array) -> Array:
        """Where in its first page a tile begins."""
        first = tile * self.shapes.sizes.tile.block_tokens
        return jax.lax.rem(first, jnp.int32(self.shapes.sizes.page_size))


def _shared(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory in the layout that wgmma and TMA take: tiles of 8 rows, swizzled."""
    layout: Any = plgpu
    columns = tile_columns(shape[-1], dtype)
    swizzle = layout.SwizzleTransform(columns * jnp.dtype(dtype).itemsize)
    return plgpu.SMEM(shape, dtype, transforms=(layout.TilingTransform((8, columns)), swizzle))


def tile_columns(row_columns: int, dtype: Any) -> int:
    """The columns of a swizzled tile: 128 bytes, or 64 where rows are an odd multiple of those."""
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = _SWIZZLE if row_columns * itemsize % _SWIZZLE == 0 else _SWIZZLE // 2
    return swizzle // itemsize
