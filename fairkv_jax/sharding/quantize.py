"""Rounds weights to int8 with one scale per channel while they are read.

A value becomes the nearest multiple of its channel's scale. The scale is the channel's largest
magnitude divided by 127, so the error is at most half a scale.
"""

import numpy as np

from fairkv_jax.checkpoint.base import LazyTensor
from fairkv_jax.sharding.shards import in_order

LARGEST = 127


def quantize_rows(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 [..., D] and float32 scales [...]; a channel lies along the last axis."""
    wide = np.asarray(values, np.float32)
    scales = np.abs(wide).max(-1) / LARGEST
    return _rounded(wide, scales[..., None]), scales


def quantize_columns(tensor: LazyTensor) -> tuple[LazyTensor, LazyTensor]:
    """int8 [..., D] and float32 scales [D]; a channel lies along all leading axes.

    The largest magnitude of a channel depends on the whole tensor, which is therefore held in
    memory until the result has been read.
    """
    rows, size = tensor.shape[0], tensor.block
    starts = range(0, rows, size)
    blocks = [in_order(tensor.read(start, min(start + size, rows))) for start in starts]
    leading = tuple(range(len(tensor.shape) - 1))
    largest = [np.abs(block.astype(np.float32)).max(leading) for block in blocks]
    scales = np.max(largest, axis=0) / np.float32(LARGEST)

    def read(start: int, stop: int) -> np.ndarray:
        block = blocks[start // size][start % size :][: stop - start]
        return _rounded(block.astype(np.float32), scales)

    def read_scales(start: int, stop: int) -> np.ndarray:
        return scales[start:stop]

    return LazyTensor(tensor.shape, size, read), LazyTensor(scales.shape, len(scales), read_scales)


def _rounded(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The nearest int8 multiples of the scales; a channel of zeros has scale 0 and stays zero."""
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)
    return np.rint(values * inverse).astype(np.int8)
