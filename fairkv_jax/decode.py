"""Decode: one token for every row of the batch, over the ragged paged cache."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Int

from fairkv_jax.attention import append_and_attend
from fairkv_jax.cache import KVCache
from fairkv_jax.models.llama import Attend, Llama
from fairkv_jax.pallas.ragged_decode import AUTO, device_of
from fairkv_jax.sampling import Sampled, SamplingState, sample
from fairkv_jax.sampling_params import SamplingParams
from fairkv_jax.shapes import TENSOR_AXIS
from fairkv_jax.sharding.place import partition_specs


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """What the host says of the batch's rows before a step."""

    tokens: Int[Array, "B"]
    """The last token of every row, whose key and value the step appends."""
    positions: Int[Array, "B"]
    """Its position in the sequence."""
    place: Int[Array, "B"]
    """Generated tokens so far: the place in the output of the one that comes."""
    sampling: SamplingState


def idle_rows(batch: int, vocab_size: int) -> Rows:
    """Rows in which nobody sits: greedy, from token 0."""
    sampling = SamplingState.stack([(SamplingParams(temperature=0), 0)] * batch, vocab_size)
    zeros = jnp.zeros(batch, jnp.int32)
    return Rows(zeros, zeros, zeros, sampling)


@partial(jax.jit, static_argnames=("mesh", "attention_backend"), donate_argnums=1)
def decode_step(
    model: Llama,
    cache: KVCache,
    rows: Rows,
    new_pages: Int[Array, "L B PC"],
    *,
    mesh: Mesh,
    attention_backend: str = AUTO,
) -> tuple[KVCache, Sampled]:
    """Appends one token to the first b rows of the cache and samples the next ones.

    b is the length of `rows`' arrays, at most B. `new_pages` holds the page that a (layer, row,
    slot) opens in this step, or -1.
    """
    by_slot = PartitionSpec(None, None, TENSOR_AXIS)
    whole = PartitionSpec()
    attend = partial(append_and_attend, backend=attention_backend, device=device_of(mesh))
    run = jax.shard_map(
        partial(_decode_local, attend=attend),
        mesh=mesh,
        in_specs=(partition_specs(model), KVCache.partition(), whole, by_slot),
        out_specs=(KVCache.partition(), whole),
        check_vma=False,
    )
    return run(model, cache, rows, new_pages)


def _decode_local(
    model: Llama, cache: KVCache, rows: Rows, new_pages: Int[Array, "L b C"], *, attend: Attend
) -> tuple[KVCache, Sampled]:
    """The part of one device, inside `shard_map`."""
    batch = len(rows.tokens)
    page_size = cache.k_pages.shape[1]
    max_pages = cache.page_table.shape[-1]
    lengths = cache.lengths[:, :batch]
    layer, row, slot = jnp.indices(new_pages.shape, sparse=True)
    opened = jnp.where(new_pages >= 0, lengths // page_size, max_pages)  # beyond: dropped
    page_table = cache.page_table.at[layer, row, slot, opened].set(new_pages, mode="drop")

    x, (k_pages, v_pages), _ = model(
        rows.tokens,
        rows.positions,
        attend,
        (cache.k_pages, cache.v_pages),
        (page_table[:, :batch], lengths),
    )
    sampled = sample(model.logits(x), rows.sampling, rows.place)
    # Not by `.at[:, :batch].add`: over all rows its scatter has no index, and XLA's partitioner
    # (jaxlib 0.11.2, for GPUs) crashes on it.
    grown = lengths + (lengths > 0)
    lengths = jax.lax.dynamic_update_slice_in_dim(cache.lengths, grown, 0, axis=1)
    return KVCache(k_pages, v_pages, page_table, lengths), sampled
