"""Decode: a token, or some, for every row of the batch, over the ragged paged cache."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Int, UInt32

from fairkv_jax.attention import append_and_attend
from fairkv_jax.cache import KVCache
from fairkv_jax.models.model import Model
from fairkv_jax.pallas.ragged_decode import AUTO, PageTable, device_of
from fairkv_jax.sampling import Sampled, SamplingState, TokenHistory, mask_words, sample
from fairkv_jax.sampling_params import SamplingParams
from fairkv_jax.shapes import TENSOR_AXIS
from fairkv_jax.sharding.load_weights import partition_specs

MAX_STEPS = 8
"""Decode steps of one dispatch, at most."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeInputs:
    """What the host says of the batch's rows before a step."""

    positions: Int[Array, "B"]
    """Of every row's last token, whose key and value the step appends."""
    place: Int[Array, "B"]
    """Generated tokens so far: the place in the output of the one that comes."""
    sampling: SamplingState
    allowed: UInt32[Array, "B W"]
    """Of guided rows, which take one step at a time: the tokens that may come, see `sample`."""


def idle_inputs(batch: int, vocab_size: int) -> DecodeInputs:
    """Rows in which nobody sits: greedy, from token 0."""
    sampling = SamplingState.stack([(SamplingParams(temperature=0), 0)] * batch, vocab_size)
    zeros = jnp.zeros(batch, jnp.int32)
    allowed = jnp.zeros((batch, mask_words(vocab_size)), jnp.uint32)
    return DecodeInputs(zeros, zeros, sampling, allowed)


@partial(jax.jit, static_argnames=("mesh", "attention_backend"), donate_argnums=1)
def decode_step(
    model: Model,
    cache: KVCache,
    rows: DecodeInputs,
    new_pages: Int[Array, "L B PC"],
    num_steps: Int[Array, ""],
    *,
    mesh: Mesh,
    attention_backend: str = AUTO,
) -> tuple[KVCache, Sampled]:
    """Appends a token to the first b rows of the cache and samples the next, `num_steps` times.

    b is the length of `rows`' arrays, at most B; `num_steps` is at most `MAX_STEPS` and a page.
    `new_pages` holds the page that a (layer, row, slot) opens in these steps, or -1. What has been
    sampled has a leading axis of `MAX_STEPS` steps, of which the first `num_steps` count.
    """
    by_slot = PartitionSpec(None, None, TENSOR_AXIS)
    whole = PartitionSpec()
    attend = partial(append_and_attend, backend=attention_backend, device=device_of(mesh))
    run = jax.shard_map(
        partial(_decode_local, attend=attend),
        mesh=mesh,
        in_specs=(partition_specs(model), KVCache.partition(), whole, by_slot, whole),
        out_specs=(KVCache.partition(), whole),
        check_vma=False,
    )
    return run(model, cache, rows, new_pages, num_steps)


def _decode_local(
    model: Model,
    cache: KVCache,
    rows: DecodeInputs,
    new_pages: Int[Array, "L b C"],
    num_steps: Int[Array, ""],
    *,
    attend: Callable[..., Any],
) -> tuple[KVCache, Sampled]:
    """The part of one device, inside `shard_map`."""
    batch = len(rows.positions)
    page_size, max_pages = cache.k_pages.shape[1], cache.page_table.shape[-1]
    lengths = cache.lengths[:, :batch]
    layer, row, slot = jnp.indices(new_pages.shape, sparse=True)
    opened = jnp.where(new_pages >= 0, -(-lengths // page_size), max_pages)  # beyond: dropped
    page_table = cache.page_table.at[layer, row, slot, opened].set(new_pages, mode="drop")
    cache = replace(cache, page_table=page_table)

    def step(i: Array, carry: tuple[KVCache, Sampled]) -> tuple[KVCache, Sampled]:
        cache, outputs = carry
        cache, sampled = _one_step(model, cache, rows, i, attend=attend)
        outputs = jax.tree.map(
            lambda all_steps, new: jax.lax.dynamic_update_index_in_dim(all_steps, new, i, 0),
            outputs,
            sampled,
        )
        return cache, outputs

    shapes = jax.eval_shape(partial(_one_step, model, attend=attend), cache, rows, num_steps)[1]
    nothing = jax.tree.map(lambda x: jnp.zeros((MAX_STEPS, *x.shape), x.dtype), shapes)
    return jax.lax.fori_loop(0, num_steps, step, (cache, nothing))


def _one_step(
    model: Model,
    cache: KVCache,
    rows: DecodeInputs,
    step: Int[Array, ""],
    *,
    attend: Callable[..., Any],
) -> tuple[KVCache, Sampled]:
    """The `step`-th token after those that the host knows of."""
    row = jnp.arange(len(rows.positions))
    position = rows.positions + step
    lengths = cache.lengths[:, : len(row)]
    page_table = PageTable.from_dense(cache.page_table)
    page_table = replace(page_table, starts=page_table.starts[:, : len(row)])
    x, (k_pages, v_pages), _ = model(
        cache.token_ids[row, position],
        position,
        partial(attend, page_table=page_table, lengths=lengths),
        (cache.k_pages, cache.v_pages),
        jnp.arange(len(lengths)),
    )
    seen = TokenHistory(cache.token_ids, position + 1)
    sampled = sample(model.logits(x), rows.sampling, rows.place + step, seen, rows.allowed)
    # A row that is replayed knows its next token; nobody reads what comes after the last one.
    is_new = position + 1 >= cache.num_known[: len(row)]
    after = jnp.where(is_new, position + 1, cache.token_ids.shape[1])  # beyond: dropped
    token_ids = cache.token_ids.at[row, after].set(sampled.tokens, mode="drop")
    # Not by `.at[:, :batch].add`: over all rows its scatter has no index, and XLA's partitioner
    # (jaxlib 0.11.2, for GPUs) crashes on it.
    grown = lengths + (lengths > 0)
    lengths = jax.lax.dynamic_update_slice_in_dim(cache.lengths, grown, 0, axis=1)
    cache = KVCache(k_pages, v_pages, cache.page_table, lengths, token_ids, cache.num_known)
    return cache, sampled
