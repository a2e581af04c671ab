"""Memory is used again, but never while an array refers to it."""

import numpy as np

from fairkv_jax.checkpoint.files import Buffers


def test_memory_comes_back_with_the_last_view():
    buffers, dtype = Buffers(), np.dtype(np.float32)
    first = buffers.array((4, 6), dtype)
    first[:] = 1
    address, view = first.ctypes.data, first[1:3].reshape(-1)[2:]
    del first
    second = buffers.array((4, 6), dtype)
    second[:] = 2
    assert second.ctypes.data != address
    np.testing.assert_array_equal(view, 1)
    del view
    assert buffers.array((2, 12), dtype).ctypes.data == address
