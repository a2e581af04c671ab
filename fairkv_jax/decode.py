"""Decode: one or several tokens for every row of the batch, over the ragged paged cache."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jax.stages import Lowered
from jaxtyping import Array, Int, UInt32

from fairkv_jax.attention import append_and_attend
from fairkv_jax.cache import KVCache, TableWrites, grow, write_table
from fairkv_jax.models.model import Model
from fairkv_jax.pallas.ragged_decode import AUTO, PageTable, device_of
from fairkv_jax.sampling import Sampled, SamplingState, TokenHistory, sample
from fairkv_jax.sampling_params import SamplingParams, num_bitmask_words
from fairkv_jax.shapes import MAX_DECODE_STEPS, next_power_of_two
from fairkv_jax.sharding.load_weights import partition_specs
from fairkv_jax.sharding.step_shapes import StepShapes

IDLE_ROW = (SamplingParams(temperature=0), 0)
"""Options and seed of a row that no request occupies."""
_MAX_TABLE_WRITES = 4096


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeInputs:
    """Per-row inputs of a decode step."""

    positions: Int[Array, "B"]
    """Position of every row's last token, whose key and value the step appends."""
    output_index: Int[Array, "B"]
    """Tokens generated so far: the index of the next one in its output."""
    sampling: SamplingState
    grammar_bitmask: UInt32[Array, "B W"]
    """Tokens that may come next in rows that follow a grammar, see `sample`; these rows take one
    step at a time."""


def idle_inputs(batch: int, vocab_size: int) -> DecodeInputs:
    """Returns inputs for unoccupied rows: greedy, from position 0."""
    sampling = SamplingState.stack([IDLE_ROW] * batch, vocab_size)
    zeros = jnp.zeros(batch, jnp.int32)
    bitmask = jnp.zeros((batch, num_bitmask_words(vocab_size)), jnp.uint32)
    return DecodeInputs(zeros, zeros, sampling, bitmask)


def max_table_writes(shapes: StepShapes) -> int:
    """Returns the maximum page-table entries per device that one step writes.

    One per (layer, row, slot), rounded up to a power of two, and at most 4096; `write_tables`
    writes further changes before the step.
    """
    spec = shapes.spec
    pairs = spec.num_layers * spec.num_rows * spec.slots_per_device
    return min(next_power_of_two(pairs), _MAX_TABLE_WRITES)


def abstract_table_writes(shapes: StepShapes) -> TableWrites:
    """The shapes of the page-table changes of a step."""
    size = (shapes.spec.num_devices, max_table_writes(shapes))
    whole = jax.ShapeDtypeStruct(size, jnp.int32)
    return shapes.placed(TableWrites(whole, whole, whole, whole), TableWrites.partition())  # pyright: ignore[reportArgumentType]


def lower_decode_step(shapes: StepShapes, batch: int, attention_backend: str = AUTO) -> Lowered:
    """Lowers `decode_step` for the first `batch` rows."""
    inputs = jax.eval_shape(lambda: idle_inputs(batch, shapes.config.vocab_size))
    return shapes.lower(
        decode_step,
        shapes.model,
        shapes.cache,
        shapes.placed(inputs),
        abstract_table_writes(shapes),
        shapes.number,
        mesh=shapes.mesh,
        attention_backend=attention_backend,
    )


@partial(jax.jit, static_argnames=("mesh", "attention_backend"), donate_argnums=1)
def decode_step(
    model: Model,
    cache: KVCache,
    inputs: DecodeInputs,
    writes: TableWrites,
    num_steps: Int[Array, ""],
    *,
    mesh: Mesh,
    attention_backend: str = AUTO,
) -> tuple[KVCache, Sampled]:
    """Appends a token to the first b rows of the cache and samples the next, `num_steps` times.

    b is the length of the arrays of `inputs`, at most B; `num_steps` is at most `MAX_DECODE_STEPS`.
    With `writes` the page tables hold the pages that these steps open. The sampled tokens have a
    leading axis of `MAX_DECODE_STEPS` steps, of which the first `num_steps` are defined.
    """
    whole = PartitionSpec()
    run = jax.shard_map(
        partial(_decode_local, backend=attention_backend, device=device_of(mesh)),
        mesh=mesh,
        in_specs=(
            partition_specs(model),
            KVCache.partition(),
            whole,
            TableWrites.partition(),
            whole,
        ),
        out_specs=(KVCache.partition(), whole),
        check_vma=False,
    )
    return run(model, cache, inputs, writes, num_steps)


def _decode_local(
    model: Model,
    cache: KVCache,
    inputs: DecodeInputs,
    writes: TableWrites,
    num_steps: Int[Array, ""],
    **attention: Any,
) -> tuple[KVCache, Sampled]:
    """One device's part, inside `shard_map`."""
    cache = replace(cache, page_table=write_table(cache.page_table, writes))
    attend = partial(_attend, keeps_queries=cache.queries is not None, **attention)
    one_step = partial(_one_step, model, attend=attend)

    def step(i: Array, carry: tuple[KVCache, Sampled]) -> tuple[KVCache, Sampled]:
        cache, outputs = carry
        cache, sampled = one_step(cache, inputs, i)
        outputs = jax.tree.map(
            lambda all_steps, new: jax.lax.dynamic_update_index_in_dim(all_steps, new, i, 0),
            outputs,
            sampled,
        )
        return cache, outputs

    shapes = jax.eval_shape(one_step, cache, inputs, num_steps)[1]
    nothing = jax.tree.map(lambda x: jnp.zeros((MAX_DECODE_STEPS, *x.shape), x.dtype), shapes)
    return jax.lax.fori_loop(0, num_steps, step, (cache, nothing))


def _attend(*args: Any, keeps_queries: bool, **attention: Any) -> tuple[Array, Any, Array | None]:
    """As `append_and_attend`; with `keeps_queries`, its outputs are the queries."""
    out, pool, _ = append_and_attend(*args, **attention)
    return out, pool, args[0] if keeps_queries else None


def _one_step(
    model: Model,
    cache: KVCache,
    inputs: DecodeInputs,
    step: Int[Array, ""],
    *,
    attend: Callable[..., Any],
) -> tuple[KVCache, Sampled]:
    """Appends and samples the `step`-th token after those that the host knows."""
    row = jnp.arange(len(inputs.positions))
    position = inputs.positions + step
    table, lengths = cache.page_table, cache.lengths[:, : len(row)]
    table = PageTable(table.pages, table.starts[:, : len(row)])
    x, pool, queries = model(
        cache.token_ids[row, position],
        position,
        partial(attend, page_table=table, lengths=lengths),
        cache.pool,
        jnp.arange(len(lengths)),
    )
    history = TokenHistory(cache.token_ids, position + 1)
    output_index = inputs.output_index + step
    logits = model.logits(x)
    sampled = sample(logits, inputs.sampling, output_index, history, inputs.grammar_bitmask)
    # A row that is replayed knows its next token; tokens past the end of a row are never read.
    is_new = position + 1 >= cache.num_known[: len(row)]
    after = jnp.where(is_new, position + 1, cache.token_ids.shape[1])  # past the end: dropped
    token_ids = cache.token_ids.at[row, after].set(sampled.tokens, mode="drop")
    cache = replace(cache, pool=pool, token_ids=token_ids)
    if cache.queries is not None:
        at = position % cache.queries.shape[2]
        cache = replace(cache, queries=cache.queries.at[:, row, at].set(queries))
    return grow(cache, len(row)), sampled
