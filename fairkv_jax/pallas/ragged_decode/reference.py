"""Ragged decode attention in plain jnp: the default on CPU, and the oracle of the kernels.

The cached tokens of all (row, slot) pairs are cut into tiles of equal size, which form one list:

    lengths   pair 0: 150   pair 1: 0   pair 2: 70        (64 tokens a tile)
    tiles     [0,0] [0,1] [0,2]         [2,0] [2,1]

The list is processed a chunk at a time, with a running softmax per pair. The time therefore follows
the number of tokens, however unequal the lengths are, and not the longest pair.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from fairkv_jax.pallas.ragged_decode.page_table import PageTable, of_layer
from fairkv_jax.pallas.ragged_decode.pool import Pool, Scales

TILE_TOKENS = 64
CHUNK_TILES = 32
_NEVER = -1e30  # a finite minus infinity: the difference of two of them is 0, not NaN


def ragged_decode(
    q: Float[Array, "B Q C G H"],
    k_pages: Num[Array, "pages page_size H"],
    v_pages: Num[Array, "pages page_size H"],
    page_table: PageTable,
    lengths: Int[Array, "*L B C"],
    layer: Int[Array, ""] | int | None = None,
    scales: Scales | None = None,
) -> Float[Array, "B Q C G H"]:
    """Softmax attention of each row's last Q tokens over the row's cached tokens."""
    batch, num_queries, slots, group, head_dim = q.shape
    pairs, page_size = batch * slots, k_pages.shape[1]
    tile_pages = max(1, TILE_TOKENS // page_size)
    tile_tokens = tile_pages * page_size
    starts = page_table.of_layer(layer).starts.reshape(pairs)
    lengths = of_layer(lengths, layer).reshape(pairs)
    ends = jnp.cumsum(-(-lengths // tile_tokens))
    # The queries of a pair share its keys: one product has them all as rows.
    q = (q.astype(jnp.float32) * head_dim**-0.5).transpose(0, 2, 1, 3, 4)
    q = q.reshape(pairs, num_queries * group, head_dim)
    by_query = CHUNK_TILES, num_queries, group, tile_tokens

    def chunk(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        acc, m, l = carry
        item = i * CHUNK_TILES + jnp.arange(CHUNK_TILES)
        pair = jnp.sum(item[:, None] >= ends, axis=1)
        is_work = pair < pairs
        pair = jnp.minimum(pair, pairs - 1)
        tile = item - jnp.where(pair > 0, ends[pair - 1], 0)
        page_at = tile[:, None] * tile_pages + jnp.arange(tile_pages)
        pages = page_table.entries(starts[pair][:, None], page_at)
        token_at = tile[:, None] * tile_tokens + jnp.arange(tile_tokens)
        is_token = is_work[:, None] & (token_at < lengths[pair][:, None])
        k = k_pages[pages].reshape(CHUNK_TILES, tile_tokens, head_dim).astype(jnp.float32)
        v = v_pages[pages].reshape(CHUNK_TILES, tile_tokens, head_dim).astype(jnp.float32)

        # Query i of Q sees the tokens up to its own, which is the (Q - i)-th from the end.
        num_later = jnp.arange(num_queries - 1, -1, -1)[:, None]
        is_seen = is_token[:, None] & (token_at[:, None] < lengths[pair][:, None, None] - num_later)
        is_seen = is_seen[:, :, None]
        scores = jnp.einsum("wrh,wth->wrt", q[pair], k)
        if scales is not None:
            k_scales = scales[0][pages].reshape(CHUNK_TILES, 1, tile_tokens)
            scores *= k_scales.astype(jnp.float32)
        scores = jnp.where(is_seen, scores.reshape(by_query), _NEVER).reshape(scores.shape)
        belongs = (pair[:, None] == jnp.arange(pairs)) & is_work[:, None]
        chunk_m = jnp.where(belongs[..., None], scores.max(-1)[:, None], _NEVER).max(0)
        new_m = jnp.maximum(m, chunk_m)
        weights = jnp.exp(scores - new_m[pair][..., None])
        weights = jnp.where(is_seen, weights.reshape(by_query), 0).reshape(scores.shape)
        if scales is not None:
            v_scales = scales[1][pages].reshape(CHUNK_TILES, tile_tokens, 1)
            v *= v_scales.astype(jnp.float32)
        v = jnp.where(is_token[..., None], v, 0)
        values = jnp.einsum("wrt,wth->wrh", weights, v)

        decay = jnp.exp(m - new_m)
        membership = belongs.astype(jnp.float32)
        acc = acc * decay[..., None] + jnp.einsum("wp,wrh->prh", membership, values)
        l = l * decay + jnp.einsum("wp,wr->pr", membership, weights.sum(-1))
        return acc, new_m, l

    zeros = jnp.zeros(q.shape[:2])
    num_chunks = -(-ends[-1] // CHUNK_TILES)
    start = jnp.zeros(q.shape), zeros + _NEVER, zeros
    acc, _, l = jax.lax.fori_loop(0, num_chunks, chunk, start)
    out = acc / jnp.where(l == 0, 1, l)[..., None]
    out = out.reshape(batch, slots, num_queries, group, head_dim)
    return out.transpose(0, 2, 1, 3, 4)


def append_and_decode(
    q: Float[Array, "B Q C G H"],
    k: Float[Array, "B Q C H"],
    v: Float[Array, "B Q C H"],
    pool: Pool,
    page_table: PageTable,
    lengths: Int[Array, "*L B C"],
    layer: Int[Array, ""] | int | None = None,
) -> tuple[Float[Array, "B Q C G H"], Pool]:
    """Writes each owned row's new keys and values after its tokens, then attends over the row."""
    page_table, lengths = page_table.of_layer(layer), of_layer(lengths, layer)
    pool, lengths = append(k, v, pool, page_table, lengths)
    pages = pool.k_pages, pool.v_pages
    return ragged_decode(q, *pages, page_table, lengths, scales=pool.scales), pool


def append(
    k: Float[Array, "B Q C H"],
    v: Float[Array, "B Q C H"],
    pool: Pool,
    page_table: PageTable,
    lengths: Int[Array, "B C"],
) -> tuple[Pool, Int[Array, "B C"]]:
    """The pool with every owned row's new tokens after its others, and the new lengths.

    A token whose page would lie past the end of the page table is dropped.
    """
    num_queries, (num_pages, page_size, _) = k.shape[1], pool.k_pages.shape
    owned = lengths > 0
    token = lengths[:, None] + jnp.arange(num_queries)[:, None]  # [B, Q, C]
    starts, page_at = page_table.starts[:, None], token // page_size
    is_written = owned[:, None] & (starts + page_at < page_table.num_entries)
    page = jnp.where(is_written, page_table.entries(starts, page_at), num_pages)
    # A page number beyond the pool: nothing is written.
    return pool.write(page, token % page_size, k, v), lengths + num_queries * owned
