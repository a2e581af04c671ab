"""Ragged decode attention in plain jnp: the default on CPU, and the oracle of the kernels.

The cached tokens of all (row, slot) pairs are cut into tiles of equal size, one list of work:

    lengths   pair 0: 150   pair 1: 0   pair 2: 70        (64 tokens a tile)
    tiles     [0,0] [0,1] [0,2]         [2,0] [2,1]

and the list is walked a chunk at a time, keeping a running softmax for every pair. The time is that
of the tokens which are there, however unequal the lengths, and not of the longest pair.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

TILE_TOKENS = 64
CHUNK_TILES = 32
_NEVER = -1e30  # a finite minus infinity: the difference of two of them is 0, not NaN

Pool = tuple[Float[Array, "pages page_size H"], Float[Array, "pages page_size H"]]


def ragged_decode(
    q: Float[Array, "B C G H"],
    k_pages: Float[Array, "pages page_size H"],
    v_pages: Float[Array, "pages page_size H"],
    page_table: Int[Array, "B C max_pages"],
    lengths: Int[Array, "B C"],
) -> Float[Array, "B C G H"]:
    """Softmax attention of one query token per row over that row's cached tokens."""
    batch, slots, group, width = q.shape
    pairs = batch * slots
    page_size = k_pages.shape[1]
    tile_pages = max(1, TILE_TOKENS // page_size)
    tile_tokens = tile_pages * page_size
    q = (q.astype(jnp.float32) * width**-0.5).reshape(pairs, group, width)
    table = page_table.reshape(pairs, -1)
    lengths = lengths.reshape(pairs)
    # Tiles of the last chunk may reach behind the table's end; their tokens are masked below.
    last_page = table.shape[1] - 1
    ends = jnp.cumsum(-(-lengths // tile_tokens))

    def chunk(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        total, peak, mass = carry
        item = i * CHUNK_TILES + jnp.arange(CHUNK_TILES)
        pair = jnp.sum(item[:, None] >= ends, axis=1)
        is_work = pair < pairs
        pair = jnp.minimum(pair, pairs - 1)
        tile = item - jnp.where(pair > 0, ends[pair - 1], 0)
        page_at = tile[:, None] * tile_pages + jnp.arange(tile_pages)
        pages = table[pair[:, None], jnp.clip(page_at, 0, last_page)]
        token_at = tile[:, None] * tile_tokens + jnp.arange(tile_tokens)
        is_token = is_work[:, None] & (token_at < lengths[pair][:, None])
        k = k_pages[pages].reshape(CHUNK_TILES, tile_tokens, width).astype(jnp.float32)
        v = v_pages[pages].reshape(CHUNK_TILES, tile_tokens, width).astype(jnp.float32)

        scores = jnp.einsum("wgh,wth->wgt", q[pair], k)
        scores = jnp.where(is_token[:, None], scores, _NEVER)
        belongs = (pair[:, None] == jnp.arange(pairs)) & is_work[:, None]
        chunk_peak = jnp.where(belongs[..., None], scores.max(-1)[:, None], _NEVER).max(0)
        new_peak = jnp.maximum(peak, chunk_peak)
        weights = jnp.exp(scores - new_peak[pair][..., None])
        weights = jnp.where(is_token[:, None], weights, 0)
        v = jnp.where(is_token[..., None], v, 0)
        values = jnp.einsum("wgt,wth->wgh", weights, v)

        decay = jnp.exp(peak - new_peak)
        membership = belongs.astype(jnp.float32)
        total = total * decay[..., None] + jnp.einsum("wp,wgh->pgh", membership, values)
        mass = mass * decay + jnp.einsum("wp,wg->pg", membership, weights.sum(-1))
        return total, new_peak, mass

    start = (
        jnp.zeros((pairs, group, width)),
        jnp.full((pairs, group), _NEVER),
        jnp.zeros((pairs, group)),
    )
    num_chunks = -(-ends[-1] // CHUNK_TILES)
    total, _, mass = jax.lax.fori_loop(0, num_chunks, chunk, start)
    out = total / jnp.where(mass == 0, 1, mass)[..., None]
    return out.reshape(batch, slots, group, width)


def append_and_decode(
    q: Float[Array, "B C G H"],
    k: Float[Array, "B C H"],
    v: Float[Array, "B C H"],
    pool: Pool,
    page_table: Int[Array, "B C max_pages"],
    lengths: Int[Array, "B C"],
) -> tuple[Float[Array, "B C G H"], Pool]:
    """Writes each owned row's new key and value behind its tokens, then attends over the row."""
    pool, lengths = append(k, v, pool, page_table, lengths)
    return ragged_decode(q, *pool, page_table, lengths), pool


def append(
    k: Float[Array, "B C H"],
    v: Float[Array, "B C H"],
    pool: Pool,
    page_table: Int[Array, "B C max_pages"],
    lengths: Int[Array, "B C"],
) -> tuple[Pool, Int[Array, "B C"]]:
    """The pool with every owned row's new token behind its others, and the lengths with it."""
    k_pages, v_pages = pool
    num_pages, page_size, _ = k_pages.shape
    owned = lengths > 0
    page = jnp.take_along_axis(page_table, (lengths // page_size)[..., None], -1)[..., 0]
    page = jnp.where(owned, page, num_pages)  # beyond the pool: dropped
    at = lengths % page_size
    k_pages = k_pages.at[page, at].set(k, mode="drop")
    v_pages = v_pages.at[page, at].set(v, mode="drop")
    return (k_pages, v_pages), lengths + owned
