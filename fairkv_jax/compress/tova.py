"""TOVA (Oren et al., 2024): the tokens that the last token attends to, the same for all heads."""

from fairkv_jax.compress.snapkv import WindowAttention


def last_query_attention() -> WindowAttention:
    """Returns SnapKV's scorer with a window of one token and without pooling.

    TOVA averages these scores over all heads of the layer, see `Method.mean_over_heads`.
    """
    return WindowAttention(window=1, pool="max", kernel=1, pool_first=False)
