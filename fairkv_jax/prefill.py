"""Prefill: runs a prompt through the model and compresses each layer's cache when it is complete.

The work goes layer by layer, and each layer in chunks of prompt tokens, so that it can stop after
any chunk and go on later while other requests decode:

    layer 0: chunk 0, chunk 1, ... | compress | layer 1: chunk 0, ...

A chunk needs the keys of its own layer only, of the chunks before it. Between two chunks the carry
holds the hidden states, one layer's keys and values, and what the layers before have kept.

Two programs do this: `run_chunks`, and `compress_layer` after each layer. Only the second, small
one contains the compression methods; the first one contains what their scorers observe. A prompt
that is kept whole needs no `compress_layer`: `run_chunks` packs its layers itself, so that one call
can run all of them. `split_at_layers` lists the calls for a range of chunks.

Every device computes the slots that it holds. The scores of all heads are gathered, every device
makes the same selection, and packs what its own slots keep, slot after slot:

    packed keys of one device   [ layer 0: slot 0 | slot 1 | .. | layer 1: slot 0 | .. | unused ]

A prompt whose beginning is in the KV cache already is prefilled from there on: its suffix runs
through the same programs, and its tokens attend to the cached prefix as well. Lengths, chunks and
scores are then those of the suffix; positions continue those of the prefix.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jax.stages import Lowered
from jaxtyping import Array, Bool, Float, Int

from fairkv_jax.attention import PagedPrefix
from fairkv_jax.cache import LAYERS_BY_DEVICE, PrefixView
from fairkv_jax.compress.budgets import MaxKept
from fairkv_jax.compress.contract import (
    Chunk,
    LayerShape,
    Method,
    Scorer,
    distinct_scorers,
    scorer_index,
)
from fairkv_jax.compress_layer import pack, with_layer
from fairkv_jax.models.model import Layer, Model
from fairkv_jax.models.rope import rotate
from fairkv_jax.prefill_block import LayerState, contributing_slots, paged_prefix, run_block
from fairkv_jax.prefill_carry import PrefillCarry, PrefillShapes, layer_shape
from fairkv_jax.sampling import Sampled, ranked_logprobs
from fairkv_jax.sharding.load_weights import partition_specs


def split_at_layers(
    start: int, stop: int, chunks_per_layer: int, *, keeps_whole: bool
) -> Iterator[tuple[int, int, int | None]]:
    """Lists the calls that run the chunks from `start` to before `stop`.

    Yields, for each call of `run_chunks`, its first chunk, the end of its chunks, and the layer
    that `compress_layer` must compress after it, or None where the layer is not complete yet or
    the prompt is kept whole.
    """
    while start < stop:
        layer, index = divmod(start, chunks_per_layer)
        end = stop if keeps_whole else min(stop, start - index + chunks_per_layer)
        is_complete = end == (layer + 1) * chunks_per_layer
        yield start, end, layer if is_complete and not keeps_whole else None
        start = end


def lower_run_chunks(shapes: PrefillShapes) -> Lowered:
    """Lowers `run_chunks`."""
    steps = shapes.steps
    prefix = PrefixView.of(steps.cache, steps.number, steps.by_slot)
    return steps.lower(
        run_chunks,
        steps.model,
        shapes.carry,
        steps.number,
        steps.number,
        steps.array((), jnp.bool_),
        (steps.number, steps.number),
        steps.by_slot,
        steps.by_head,
        prefix if shapes.has_prefix else None,
        mesh=steps.mesh,
        methods=shapes.methods,
        chunk_size=shapes.chunk_size,
        max_kept=shapes.max_kept,
        has_int8_cache=steps.spec.is_quantized,
    )


@partial(
    jax.jit,
    static_argnames=("mesh", "methods", "chunk_size", "max_kept", "has_int8_cache"),
    donate_argnums=1,
)
def run_chunks(
    model: Model,
    carry: PrefillCarry,
    length: Int[Array, ""],
    method: Int[Array, ""],
    keeps_whole: Bool[Array, ""],
    chunks: tuple[Int[Array, ""], Int[Array, ""]],
    head_of_slot: Int[Array, "L PC"],
    first_slot: Int[Array, "L K"],
    prefix: PrefixView | None = None,
    *,
    mesh: Mesh,
    methods: tuple[Method, ...],
    chunk_size: int,
    max_kept: MaxKept,
    has_int8_cache: bool = False,
) -> tuple[PrefillCarry, Int[Array, ""]]:
    """Runs the chunks from the first to before the second of `chunks`, at least one.

    Also returns their number, which remains readable when the next program has taken the carry.

    Chunks are numbered layer by layer. The prompt has `length` tokens. Unless it is kept whole
    (`keeps_whole`), `methods[method]` compresses it: then the chunks must be of one layer, and
    `compress_layer` must follow the last one of a layer.

    With `prefix`, the prompt is the suffix of one whose beginning a row of the KV cache holds.
    Every head of every layer must have tokens there.

    With `has_int8_cache`, tokens attend to keys and values that are rounded as in the cache.
    """

    def local(
        model: Model,
        carry: PrefillCarry,
        head_of_slot: Array,
        prefix: PrefixView | None,
        *whole: Array,
    ) -> tuple[PrefillCarry, Array]:
        return _run_chunks_local(
            model,
            carry,
            head_of_slot,
            prefix,
            *whole,
            methods=methods,
            chunk_size=chunk_size,
            max_kept=max_kept,
            has_int8_cache=has_int8_cache,
        )

    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(
            partition_specs(model),
            PrefillCarry.partition(),
            LAYERS_BY_DEVICE,
            None if prefix is None else PrefixView.partition(),
            *(PartitionSpec(),) * 6,
        ),
        out_specs=(PrefillCarry.partition(), PartitionSpec()),
        check_vma=False,
    )
    return run(model, carry, head_of_slot, prefix, first_slot, length, method, keeps_whole, *chunks)


def lower_score_prompt(shapes: PrefillShapes, block: int) -> Lowered:
    """Lowers `score_prompt` for blocks of that many positions."""
    steps = shapes.steps
    return steps.lower(
        score_prompt,
        steps.model,
        shapes.carry.hidden,
        shapes.tokens,
        steps.number,
        mesh=steps.mesh,
        block=block,
    )


@partial(jax.jit, static_argnames=("mesh", "block"))
def score_prompt(
    model: Model,
    hidden: Float[Array, "T D"],
    tokens: Int[Array, "bucket"],
    start: Int[Array, ""],
    *,
    mesh: Mesh,
    block: int,
) -> Sampled:
    """Returns the log-probabilities of the tokens that follow a block of `block` positions.

    `hidden` is that of a prefill that has run all its chunks. The result is a `Sampled`, as if the
    prompt's own tokens had been sampled. Entries for the prompt's last position and for padding
    are undefined.
    """

    def local(model: Model, hidden: Array, tokens: Array, start: Array) -> Sampled:
        padding = hidden.shape[0] - tokens.shape[0] + 1
        following = jnp.pad(tokens[1:], (0, padding))
        chosen = jax.lax.dynamic_slice_in_dim(following, start, block)
        logits = model.logits(jax.lax.dynamic_slice_in_dim(hidden, start, block))
        return Sampled(chosen, *ranked_logprobs(logits, chosen))

    whole = PartitionSpec()
    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(partition_specs(model), whole, whole, whole),
        out_specs=whole,
        check_vma=False,
    )
    return run(model, hidden, tokens, start)


def lower_logits_at(shapes: PrefillShapes) -> Lowered:
    """Lowers `logits_at`."""
    steps = shapes.steps
    return steps.lower(logits_at, steps.model, shapes.carry.hidden, steps.number, mesh=steps.mesh)


@partial(jax.jit, static_argnames="mesh")
def logits_at(
    model: Model, hidden: Float[Array, "T D"], index: Int[Array, ""], *, mesh: Mesh
) -> Float[Array, "V"]:
    """Returns the logits of what follows one token, see `logits_of`."""
    return logits_of(model, hidden, index, mesh=mesh, block=1)[0]


@partial(jax.jit, static_argnames=("mesh", "block"))
def logits_of(
    model: Model,
    hidden: Float[Array, "T D"],
    start: Int[Array, ""],
    *,
    mesh: Mesh,
    block: int,
) -> Float[Array, "block V"]:
    """Returns the logits of `block` positions of a prefill that has run all its chunks."""

    def local(model: Model, hidden: Array, start: Array) -> Array:
        return model.logits(jax.lax.dynamic_slice_in_dim(hidden, start, block))

    whole = PartitionSpec()
    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(partition_specs(model), whole, whole),
        out_specs=whole,
        check_vma=False,
    )
    return run(model, hidden, start)


def _run_chunks_local(
    model: Model,
    carry: PrefillCarry,
    head_of_slot: Int[Array, "L C"],
    prefix: PrefixView | None,
    first_slot: Int[Array, "L K"],
    length: Int[Array, ""],
    method: Int[Array, ""],
    keeps_whole: Bool[Array, ""],
    start: Int[Array, ""],
    stop: Int[Array, ""],
    *,
    methods: tuple[Method, ...],
    chunk_size: int,
    max_kept: MaxKept,
    has_int8_cache: bool,
) -> tuple[PrefillCarry, Int[Array, ""]]:
    """Runs one device's part of `run_chunks`, inside `shard_map`."""
    num_layers, num_heads = first_slot.shape
    per_layer = (length + chunk_size - 1) // chunk_size
    first, last = start // per_layer, (stop - 1) // per_layer
    contributes = contributing_slots(head_of_slot, first_slot, prefix)
    scorers = distinct_scorers(methods)
    observer = jnp.where(keeps_whole, -1, scorer_index(methods, method))
    num_tokens = carry.k.shape[1]
    keep_prompt = jnp.broadcast_to(jnp.arange(num_tokens) < length, (num_heads, num_tokens))
    shape = layer_shape(model, num_tokens)
    run_chunk = partial(_run_chunk, chunk_size=chunk_size, has_int8_cache=has_int8_cache)

    def run_layer(index: Array, carry: PrefillCarry) -> PrefillCarry:
        layer = model.layer(index)
        of_layer = None if prefix is None else paged_prefix(prefix, index)

        def run(i: Array, carry: PrefillCarry) -> PrefillCarry:
            at = i * chunk_size
            carry, chunk = run_chunk(model, layer, carry, contributes[index], at, length, of_layer)
            return replace(carry, stats=_observe(scorers, observer, carry.stats, chunk, shape))

        begin = jnp.where(index == first, start % per_layer, 0)
        end = jnp.where(index == last, (stop - 1) % per_layer + 1, per_layer)
        carry = jax.lax.fori_loop(begin, end, run, carry)
        # What is written for an incomplete layer, or for one to be compressed, is overwritten.
        pack_all = partial(pack, carry, keep_prompt, head_of_slot[index], max_kept)
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(pack_all))
        packed = jax.lax.cond(keeps_whole & (end == per_layer), pack_all, lambda: nothing)
        return replace(carry, prefix=with_layer(carry.prefix, index, packed))

    carry = jax.lax.fori_loop(first, last + 1, run_layer, carry)
    x = jax.lax.dynamic_slice_in_dim(carry.hidden, length - 1, 1)
    logits = jax.lax.cond(
        stop == num_layers * per_layer, lambda: model.logits(x)[0], lambda: carry.prefix.logits
    )
    return replace(carry, prefix=replace(carry.prefix, logits=logits)), stop - start


def _run_chunk(
    model: Model,
    layer: Layer,
    carry: PrefillCarry,
    contributes: Bool[Array, "C"],
    at: Int[Array, ""],
    length: Int[Array, ""],
    prefix: PagedPrefix | None,
    *,
    chunk_size: int,
    has_int8_cache: bool,
) -> tuple[PrefillCarry, Chunk]:
    """Runs the tokens from `at` on through a layer; also returns what scorers may observe."""
    first = carry.first_position
    state = LayerState(carry.hidden, carry.k, carry.v)
    state, block = run_block(
        model,
        layer,
        state,
        contributes,
        at,
        chunk_size,
        first_position=first,
        begins=carry.begins,
        prefix=prefix,
        has_int8_cache=has_int8_cache,
    )
    heads = block.q.reshape(chunk_size, -1, block.q.shape[-1])
    # XLA removes what no scorer reads.
    chunk = Chunk(
        length,
        first_position=first,
        positions=block.index,
        frequencies=model.angles(jnp.ones(1, jnp.int32))[0],
        x=block.x,
        q_unrotated=rotate(heads, -block.angles).reshape(block.q.shape),
        q=block.q,
        k=block.k,
        v=block.v,
        w_o=layer.output_weights(),
    )
    return replace(carry, hidden=state.hidden, k=state.k, v=state.v), chunk


def _observe(
    scorers: tuple[Scorer, ...],
    chosen: Int[Array, ""],
    stats: tuple[Any, ...],
    chunk: Chunk,
    shape: LayerShape,
) -> tuple[Any, ...]:
    """Updates the statistics of `scorers[chosen]`, or of none for -1.

    They start anew at the first chunk of each layer.
    """
    is_first = chunk.positions[0] == 0

    def update(index: int) -> tuple[Any, ...]:
        scorer = scorers[index]
        old = jax.tree.map(partial(jnp.where, is_first), scorer.init(shape), stats[index])
        return *stats[:index], scorer.observe(old, chunk), *stats[index + 1 :]

    updates = [partial(update, index) for index in range(len(scorers))]
    return jax.lax.switch(chosen + 1, [lambda: stats, *updates])
