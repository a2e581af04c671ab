"""Makes head profiles: from published head scores, at random, or by measurement."""

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
