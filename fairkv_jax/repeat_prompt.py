"""Lets the model repeat a prompt that it has read, for methods that score it by that (KVzip).

The prompt is prefilled and kept whole. Then parts of it are run through the model again, each
behind an instruction to repeat it, and as a continuation of the whole prompt:

    prompt (kept whole) | instruction, part 0        layer 0: chunk 0, 1, ..; layer 1: ..
    prompt (kept whole) | instruction, part 1        ..

A repetition leaves nothing behind but its scorer's statistics, by which `compress_prompt` then
compresses the prompt.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jax.stages import Lowered
from jaxtyping import Array, Float, Int

from fairkv_jax.attention import KEY_BLOCK
from fairkv_jax.cache import LAYERS_BY_DEVICE, PrefixView
from fairkv_jax.compress.contract import (
    RepeatedChunk,
    RepeatingScorer,
)
from fairkv_jax.models.model import Model
from fairkv_jax.prefill_block import LayerState, contributing_slots, paged_prefix, run_block
from fairkv_jax.prefill_carry import PrefillCarry, PrefillShapes, layer_shape
from fairkv_jax.shapes import TENSOR_AXIS, round_up
from fairkv_jax.sharding.load_weights import partition_specs


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RepetitionCarry:
    """A repetition on its way through the layers; donated to every program that continues it."""

    hidden: Float[Array, "S D"]
    """As in `PrefillCarry`; so are the following."""
    k: Float[Array, "PC S H"]
    v: Float[Array, "PC S H"]
    stats: Any
    """The scorer's statistics of all layers and of all repetitions so far: [L, PC, ...]."""

    @classmethod
    def partition(cls) -> "RepetitionCarry":
        """Returns how each array is split over the mesh, as a prefix of the carry's pytree."""
        whole: Any = PartitionSpec()
        split: Any = PartitionSpec(TENSOR_AXIS)
        return cls(whole, split, split, LAYERS_BY_DEVICE)


def abstract_carry(shapes: PrefillShapes) -> RepetitionCarry:
    """Returns the shapes of the carry of a prompt's repetitions."""
    start = partial(
        start_repetition,
        mesh=shapes.steps.mesh,
        scorer=_scorer(shapes),
        chunk_size=shapes.chunk_size,
        max_tokens=shapes.max_repetition,
        num_tokens=shapes.carry.k.shape[1],
    )
    return shapes.steps.placed(
        jax.eval_shape(start, shapes.steps.model), RepetitionCarry.partition()
    )


def _scorer(shapes: PrefillShapes) -> RepeatingScorer:
    """The engine's own scorer; requests cannot choose one that repeats the prompt."""
    scorer: Any = shapes.methods[0].scorer
    return scorer


def lower_start_repetition(shapes: PrefillShapes) -> Lowered:
    """Lowers `start_repetition`."""
    return shapes.steps.lower(
        start_repetition,
        shapes.steps.model,
        mesh=shapes.steps.mesh,
        scorer=_scorer(shapes),
        chunk_size=shapes.chunk_size,
        max_tokens=shapes.max_repetition,
        num_tokens=shapes.carry.k.shape[1],
    )


@partial(jax.jit, static_argnames=("mesh", "scorer", "chunk_size", "max_tokens", "num_tokens"))
def start_repetition(
    model: Model,
    *,
    mesh: Mesh,
    scorer: RepeatingScorer,
    chunk_size: int,
    max_tokens: int,
    num_tokens: int,
) -> RepetitionCarry:
    """Allocates what the repetitions of a prompt carry.

    Args:
        max_tokens: most tokens of a repetition.
        num_tokens: tokens of the prompt's arrays in its `PrefillCarry`.
    """

    def local(model: Model) -> RepetitionCarry:
        config, shape = model.config, layer_shape(model, num_tokens)
        size = round_up(max_tokens, chunk_size)
        keys = jnp.zeros((shape.num_slots, size, config.head_dim), model.dtype)
        stats = jax.tree.map(
            lambda x: jnp.broadcast_to(x, (config.num_layers, *x.shape)), scorer.init(shape)
        )
        hidden = jnp.zeros((size, config.hidden_size), model.dtype)
        return RepetitionCarry(hidden, keys, keys, stats)

    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(partition_specs(model),),
        out_specs=RepetitionCarry.partition(),
        check_vma=False,
    )
    return run(model)


def lower_repeat_chunks(shapes: PrefillShapes) -> Lowered:
    """Lowers `repeat_chunks`."""
    steps, carry = shapes.steps, abstract_carry(shapes)
    pair = steps.number, steps.number
    prefix = PrefixView.of(steps.cache, steps.number, steps.by_slot)
    return steps.lower(
        repeat_chunks,
        steps.model,
        carry,
        shapes.carry,
        steps.array(carry.hidden.shape[:1]),
        steps.number,
        steps.number,
        pair,
        pair,
        steps.by_slot,
        steps.by_head,
        prefix if shapes.has_prefix else None,
        mesh=steps.mesh,
        scorer=_scorer(shapes),
        chunk_size=shapes.chunk_size,
    )


@partial(jax.jit, static_argnames=("mesh", "scorer", "chunk_size"), donate_argnums=1)
def repeat_chunks(
    model: Model,
    carry: RepetitionCarry,
    prompt: PrefillCarry,
    tokens: Int[Array, "S"],
    num_tokens: Int[Array, ""],
    length: Int[Array, ""],
    part: tuple[Int[Array, ""], Int[Array, ""]],
    chunks: tuple[Int[Array, ""], Int[Array, ""]],
    head_of_slot: Int[Array, "L PC"],
    first_slot: Int[Array, "L K"],
    prefix: PrefixView | None = None,
    *,
    mesh: Mesh,
    scorer: RepeatingScorer,
    chunk_size: int,
) -> tuple[RepetitionCarry, Int[Array, ""]]:
    """Runs chunks of one repetition, from the first to before the second of `chunks`.

    Chunks are numbered layer by layer. Also returns their number, see `prefill.run_chunks`.

    Args:
        prompt: what the prefill of the prompt, kept whole, has left.
        tokens: the repetition, of which the first `num_tokens` count.
        length: tokens of the prompt.
        part: the tokens [start, stop) of the prompt that are repeated.
        prefix: what precedes the prompt in the KV cache, if anything does.
    """

    def local(
        model: Model,
        carry: RepetitionCarry,
        prompt: PrefillCarry,
        head_of_slot: Array,
        prefix: PrefixView | None,
        *whole: Any,
    ) -> tuple[RepetitionCarry, Array]:
        return _repeat_local(
            model,
            carry,
            prompt,
            head_of_slot,
            prefix,
            *whole,
            scorer=scorer,
            chunk_size=chunk_size,
        )

    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(
            partition_specs(model),
            RepetitionCarry.partition(),
            PrefillCarry.partition(),
            LAYERS_BY_DEVICE,
            None if prefix is None else PrefixView.partition(),
            *(PartitionSpec(),) * 6,
        ),
        out_specs=(RepetitionCarry.partition(), PartitionSpec()),
        check_vma=False,
    )
    whole = first_slot, tokens, num_tokens, length, part, chunks
    return run(model, carry, prompt, head_of_slot, prefix, *whole)


def _repeat_local(
    model: Model,
    carry: RepetitionCarry,
    prompt: PrefillCarry,
    head_of_slot: Int[Array, "L C"],
    prefix: PrefixView | None,
    first_slot: Int[Array, "L K"],
    tokens: Int[Array, "S"],
    num_tokens: Int[Array, ""],
    length: Int[Array, ""],
    part: tuple[Int[Array, ""], Int[Array, ""]],
    chunks: tuple[Int[Array, ""], Int[Array, ""]],
    *,
    scorer: RepeatingScorer,
    chunk_size: int,
) -> tuple[RepetitionCarry, Int[Array, ""]]:
    """Runs one device's part of `repeat_chunks`, inside `shard_map`."""
    start, stop = chunks
    per_layer = (num_tokens + chunk_size - 1) // chunk_size
    first, last = start // per_layer, (stop - 1) // per_layer
    contributes = contributing_slots(head_of_slot, first_slot, prefix)
    size = carry.k.shape[1]

    def run_layer(index: Array, carry: RepetitionCarry) -> RepetitionCarry:
        layer = model.layer(index)
        of_layer = None if prefix is None else paged_prefix(prefix, index)
        prompt_k, prompt_v = prompt.whole_layer(index)
        # The repetition comes right behind the prompt's last token.
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(_extended(x, size), own, length, 1)
            for x, own in ((prompt_k, carry.k), (prompt_v, carry.v))
        )

        def run(i: Array, running: tuple[LayerState, Any]) -> tuple[LayerState, Any]:
            state, block = run_block(
                model,
                layer,
                running[0],
                contributes[index],
                i * chunk_size,
                chunk_size,
                first_position=prompt.first_position + length,
                num_before=length,
                prefix=of_layer,
            )
            k = jax.lax.dynamic_slice_in_dim(state.k, length, size, 1)
            chunk = RepeatedChunk(
                length, part, block.index, num_tokens, block.x, block.q, prompt_k, k
            )
            return state, scorer.observe_repetition(running[1], chunk)

        begin = jnp.where(index == first, start % per_layer, 0)
        end = jnp.where(index == last, (stop - 1) % per_layer + 1, per_layer)
        stats = jax.tree.map(lambda x: x[index], carry.stats)
        state = LayerState(carry.hidden, keys, values)
        state, stats = jax.lax.fori_loop(begin, end, run, (state, stats))
        k, v = (jax.lax.dynamic_slice_in_dim(x, length, size, 1) for x in (state.k, state.v))
        return RepetitionCarry(
            state.hidden,
            k,
            v,
            jax.tree.map(
                lambda whole, new: jax.lax.dynamic_update_index_in_dim(whole, new, index, 0),
                carry.stats,
                stats,
            ),
        )

    hidden = jax.lax.cond(start == 0, lambda: model.embedded(tokens), lambda: carry.hidden)
    carry = jax.lax.fori_loop(first, last + 1, run_layer, replace(carry, hidden=hidden))
    return carry, stop - start


def _extended(x: Float[Array, "C T H"], num_tokens: int) -> Float[Array, "C n H"]:
    """Returns the array with room for so many tokens more, and a multiple of a block of keys."""
    size = round_up(x.shape[1] + num_tokens, KEY_BLOCK)
    return jnp.pad(x, [(0, 0), (0, size - x.shape[1]), (0, 0)])
