"""Makes head profiles and head scores: published, at random, measured, or learned."""

from fairkv_jax.profile.published import (
    from_duo_attention,
    from_headkv,
    read_headkv_json,
    read_table,
)
from fairkv_jax.profile.synthetic import synthetic_profile

__all__ = [
    "from_duo_attention",
    "from_headkv",
    "read_headkv_json",
    "read_table",
    "synthetic_profile",
]
