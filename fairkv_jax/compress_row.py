"""Compresses the cache of a row again while it decodes, over prompt and output together.

Layer by layer, the row's keys and values are read from its pages, scored, and what each head keeps
is moved together in the same pages:

    before   [ a b c d | e f g h | i j k . ]     kept: a c d, f, i j k
    after    [ a c d f | i j k . | . . . . ]     the last page is not needed any more

Pages before the first dropped token are not written, so that the pages that a row shares with
others, those of a cached prefix, stay as they are. The host learns the new lengths, and frees the
pages that are left over. Keys keep their positions. Scores of all heads are gathered, so that every
device makes the same selection.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jax.stages import Lowered
from jaxtyping import Array, Bool, Float, Int

from fairkv_jax.cache import LAYERS_BY_DEVICE, KVCache
from fairkv_jax.compress.contract import Chunk, Method, Scorer, Scores, Stats
from fairkv_jax.models.model import Model
from fairkv_jax.models.rope import rotate
from fairkv_jax.pallas.ragged_decode import Pool
from fairkv_jax.prefill_carry import layer_shape
from fairkv_jax.shapes import TENSOR_AXIS
from fairkv_jax.sharding.load_weights import partition_specs
from fairkv_jax.sharding.step_shapes import StepShapes


def lower_compress_row(
    shapes: StepShapes, num_tokens: int, method: Method, num_protected: int
) -> Lowered:
    """Lowers `compress_row` for rows of at most `num_tokens` tokens per head."""
    return shapes.lower(
        compress_row,
        shapes.model,
        shapes.cache,
        shapes.number,
        shapes.number,
        shapes.by_head,
        shapes.by_head,
        shapes.by_slot,
        mesh=shapes.mesh,
        method=method,
        num_protected=num_protected,
        num_tokens=num_tokens,
    )


@partial(
    jax.jit,
    static_argnames=("mesh", "method", "num_protected", "num_tokens"),
    donate_argnums=1,
)
def compress_row(
    model: Model,
    cache: KVCache,
    row: Int[Array, ""],
    position: Int[Array, ""],
    budgets: Int[Array, "L K"],
    fixed_lengths: Int[Array, "L K"],
    head_of_slot: Int[Array, "L PC"],
    *,
    mesh: Mesh,
    method: Method,
    num_protected: int,
    num_tokens: int,
) -> tuple[KVCache, Int[Array, "L K"]]:
    """Drops what `method` does not keep of a row, and returns the tokens that each head has kept.

    A layer that holds no more than the sum of its budgets is left as it is.

    Args:
        position: that of the row's last token.
        budgets: tokens of each head; the method's allocator may move them within a layer.
        fixed_lengths: the first tokens of each head, which belong to a cached prefix. They and the
            last `num_protected` are kept, and count towards the budgets.
        num_tokens: no head holds more; a multiple of the page size.
    """

    def local(model: Model, cache: KVCache, *rest: Array) -> tuple[KVCache, Array]:
        return _compress_local(
            model, cache, *rest, method=method, num_protected=num_protected, num_tokens=num_tokens
        )

    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(
            partition_specs(model),
            KVCache.partition(),
            LAYERS_BY_DEVICE,
            *(PartitionSpec(),) * 4,
        ),
        out_specs=(KVCache.partition(), PartitionSpec()),
        check_vma=False,
    )
    return run(model, cache, head_of_slot, row, position, budgets, fixed_lengths)


def _compress_local(
    model: Model,
    cache: KVCache,
    head_of_slot: Int[Array, "L C"],
    row: Int[Array, ""],
    position: Int[Array, ""],
    budgets: Int[Array, "L K"],
    fixed_lengths: Int[Array, "L K"],
    *,
    method: Method,
    num_protected: int,
    num_tokens: int,
) -> tuple[KVCache, Int[Array, "L K"]]:
    """Runs one device's part of `compress_row`, inside `shard_map`."""
    page_size = cache.pool.k_pages.shape[1]
    lengths, starts = cache.lengths[:, row], cache.page_table.starts[:, row]
    page_at = jnp.arange(num_tokens // page_size)

    def compress_layer(layer: Array, carry: tuple[Pool, Array, Array]) -> tuple[Pool, Array, Array]:
        pool, slot_lengths, head_lengths = carry
        heads, of_slots, of_heads = head_of_slot[layer], lengths[layer], budgets[layer]
        pages = cache.page_table.entries(starts[layer][:, None], page_at)
        read = pool.read(pages, model.dtype)
        k, v = (x.reshape(len(pages), num_tokens, -1) for x in read)
        is_cached = (jnp.arange(num_tokens) < of_slots[:, None])[..., None]
        k, v = jnp.where(is_cached, k, 0), jnp.where(is_cached, v, 0)  # free places may be NaN
        stats = _stats(model, cache, method.scorer, num_tokens, layer, row, position)
        slot_budgets = of_heads[jnp.maximum(heads, 0)]
        scores = _score(method.scorer, stats, k, v, of_slots, slot_budgets)
        scores, all_heads, all_lengths = jax.lax.all_gather(
            (scores, heads, of_slots), TENSOR_AXIS, tiled=True
        )
        is_owner = (all_heads == jnp.arange(len(of_heads))[:, None]) & (all_lengths > 0)
        owner = jnp.argmax(is_owner, 1)
        keep = _select(
            method,
            jax.tree.map(lambda x: x[owner], scores),
            of_heads,
            all_lengths[owner],
            fixed_lengths[layer],
            num_protected,
        )
        own = keep[heads] & (of_slots > 0)[:, None]
        pool = _move_together(pool, pages, own)
        slot_lengths = slot_lengths.at[layer].set(jnp.sum(own, 1))
        return pool, slot_lengths, head_lengths.at[layer].set(jnp.sum(keep, 1))

    start = cache.pool, lengths, jnp.zeros_like(budgets)
    pool, slot_lengths, head_lengths = jax.lax.fori_loop(0, len(budgets), compress_layer, start)
    lengths = cache.lengths.at[:, row].set(slot_lengths)
    return replace(cache, pool=pool, lengths=lengths), head_lengths


def _stats(
    model: Model,
    cache: KVCache,
    scorer: Scorer,
    num_tokens: int,
    layer: Int[Array, ""],
    row: Int[Array, ""],
    position: Int[Array, ""],
) -> Stats:
    """Returns what the scorer has seen in one layer when it has seen the row's last queries."""
    stats = scorer.init(layer_shape(model, num_tokens))
    if cache.queries is None:
        return stats
    size = cache.queries.shape[2]
    positions = position - size + 1 + jnp.arange(size)
    q = cache.queries[layer, row, positions % size]
    unrotated = rotate(q.reshape(size, -1, q.shape[-1]), -model.angles(positions))
    unknown: Any = None  # the scorers of rows do not read it
    chunk = Chunk(
        position + 1,
        first_position=jnp.zeros_like(position),
        positions=positions,
        frequencies=model.angles(jnp.ones(1, jnp.int32))[0],
        x=unknown,
        q_unrotated=unrotated.reshape(q.shape),
        q=q,
        k=unknown,
        v=unknown,
        w_o=unknown,
    )
    return scorer.observe(stats, chunk)


def _score(
    scorer: Scorer,
    stats: Stats,
    k: Float[Array, "C T H"],
    v: Float[Array, "C T H"],
    lengths: Int[Array, "C"],
    budgets: Int[Array, "C"],
) -> Scores:
    """Scores the tokens of slots that hold different numbers of them."""

    def of_slot(stats: Stats, *arrays: Array) -> Scores:
        stats, k, v, budgets = jax.tree.map(lambda x: x[None], (stats, *arrays[:2], arrays[3]))
        return jax.tree.map(lambda x: x[0], scorer.score(stats, k, v, arrays[2], budgets))

    return jax.vmap(of_slot)(stats, k, v, lengths, budgets)


def _select(
    method: Method,
    scores: Scores,
    budgets: Int[Array, "K"],
    lengths: Int[Array, "K"],
    fixed_lengths: Int[Array, "K"],
    num_protected: int,
) -> Bool[Array, "K T"]:
    """Marks the tokens that each head of a layer keeps, see `compress_row`."""
    position = jnp.arange(scores.primary.shape[1])
    first = jnp.maximum(fixed_lengths, method.scorer.num_sinks)[:, None]
    last = lengths[:, None]
    is_cached = position < last
    is_protected = (position < first) | (position >= last - num_protected)
    primary = jnp.where(is_protected, jnp.inf, scores.primary)
    primary = jnp.where(is_cached, primary, -jnp.inf)
    keep = method.allocator(replace(scores, primary=primary), budgets)
    return is_cached & (keep | (jnp.sum(lengths) <= jnp.sum(budgets)))


def _move_together(pool: Pool, pages: Int[Array, "C n"], keep: Bool[Array, "C T"]) -> Pool:
    """Writes the kept tokens of each slot to the first of its pages, in their order.

    Pages that do not change are not written.
    """
    num_slots, num_pages = pages.shape
    order = jnp.argsort(~keep, axis=1, stable=True)
    count = jnp.sum(keep, 1)[:, None]
    page_size = keep.shape[1] // num_pages
    num_unmoved = jnp.sum(jnp.cumprod(keep, 1), 1)[:, None]
    page_at = jnp.arange(num_pages)
    changes = ((page_at + 1) * page_size > num_unmoved) & (page_at * page_size < count)

    def move(x: Array) -> Array:
        tokens = x[pages].reshape(num_slots, num_pages * page_size, *x.shape[2:])
        moved = tokens[jnp.arange(num_slots)[:, None], order].reshape(*pages.shape, *x.shape[1:])
        target = jnp.where(changes, pages, x.shape[0])  # past the pool: dropped
        return x.at[target].set(moved, mode="drop")

    return jax.tree.map(move, pool)
