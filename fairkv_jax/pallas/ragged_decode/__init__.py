"""Decode attention over a paged pool with a length per (row, slot).

The contract of every implementation:

    ragged_decode(q [B,C,G,H], k_pages, v_pages [pages,page_size,H],
                  page_table [B,C,max_pages] int32, lengths [B,C] int32) -> o [B,C,G,H]

accumulated in float32 and scaled by 1/sqrt(H); a length of 0 gives zeros, and what lies behind a
length is never read into the result.
"""

from fairkv_jax.pallas.ragged_decode.reference import ragged_decode

__all__ = ["ragged_decode"]
