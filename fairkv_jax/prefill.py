"""Prefill: a prompt through the model, each layer's cache compressed as soon as it is there.

The work is cut into units, a block of the prompt's tokens in one layer, so that it can stop
anywhere and go on later while others decode:

    layer 0: block 0, block 1, ... | compress | layer 1: block 0, ...

A block needs the keys of its own layer only, of the blocks before it. Between two units there wait
the hidden states and one layer's keys and values; of the layers behind, only what they keep.

Every device computes the slots that it holds. The scores of all heads are gathered, every device
makes the same selection, and packs what its own slots keep, head after head:

    packed keys of one layer and device   [ slot 0's kept tokens | slot 1's | ... | unused ]
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from fairkv_jax.attention import KEY_BLOCK, attend_to_prompt
from fairkv_jax.cache import KVCache
from fairkv_jax.compress import Policy
from fairkv_jax.compress.scorers import window_start
from fairkv_jax.models.model import Model
from fairkv_jax.models.params import round_up
from fairkv_jax.sampling import Sampled, ranked_logprobs
from fairkv_jax.shapes import TENSOR_AXIS
from fairkv_jax.sharding.load_weights import partition_specs
from fairkv_jax.sharding.slots import SlotLayout

_BY_DEVICE = PartitionSpec(None, TENSOR_AXIS)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CompressedPrefix:
    """The compressed cache of one prompt, ready to be inserted into a row.

    R is the most tokens that a device packs a layer; `positions` counts from the prompt's start.
    """

    k: Float[Array, "L PR H"]
    v: Float[Array, "L PR H"]
    positions: Int[Array, "L PR"]
    slot_lengths: Int[Array, "L PC"]
    """Kept tokens of every slot, replicas included; 0 in empty slots."""
    head_lengths: Int[Array, "L K"]
    logits: Float[Array, "V"]
    """Of the token that follows the prompt, float32."""

    @classmethod
    def partition(cls) -> "CompressedPrefix":
        """How each array is split over the mesh."""
        whole: Any = PartitionSpec()
        split: Any = _BY_DEVICE
        return cls(split, split, split, split, whole, whole)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PrefillCarry:
    """A prompt on its way through the layers; donated to every part of the prefill."""

    hidden: Float[Array, "T D"]
    """Inputs of the present layer, its outputs where a block has passed it."""
    k: Float[Array, "PC T H"]
    v: Float[Array, "PC T H"]
    """Of the present layer, as far as its blocks are done."""
    window: Float[Array, "PC G w H"]
    """Queries of the prompt's last w tokens in the present layer: they score its keys."""
    prefix: CompressedPrefix

    @classmethod
    def partition(cls) -> "PrefillCarry":
        """How each array is split over the mesh."""
        whole: Any = PartitionSpec()
        split: Any = PartitionSpec(TENSOR_AXIS)
        return cls(whole, split, split, split, CompressedPrefix.partition())


@dataclass(frozen=True)
class KeptTokens:
    """What a prefix kept of its prompt, on the host."""

    lengths: np.ndarray
    """[L, K] tokens."""
    positions: list[list[np.ndarray]] | None
    """For each layer and head its kept positions, ascending."""


def kept_tokens(prefix: CompressedPrefix, layout: SlotLayout, *, positions: bool) -> KeptTokens:
    """Reads back what a prefix kept; its positions only where they are asked for."""
    lengths = np.asarray(prefix.head_lengths)
    if not positions:
        return KeptTokens(lengths, None)
    num_layers = len(lengths)
    packed = np.asarray(prefix.positions).reshape(num_layers, layout.num_devices, -1)
    by_slot = np.asarray(prefix.slot_lengths).reshape(num_layers, layout.num_devices, -1)
    starts = (np.cumsum(by_slot, -1) - by_slot).reshape(num_layers, -1)

    def of_head(layer: int, head: int) -> np.ndarray:
        slot = layout.first_slot[layer, head]
        start = starts[layer, slot]
        return packed[layer, slot // layout.slots_per_device][start : start + lengths[layer, head]]

    heads = range(layout.num_heads)
    return KeptTokens(lengths, [[of_head(n, head) for head in heads] for n in range(num_layers)])


@partial(jax.jit, static_argnames=("mesh", "block", "window", "packed_size"))
def start_prefill(
    model: Model, tokens: Int[Array, "T"], *, mesh: Mesh, block: int, window: int, packed_size: int
) -> PrefillCarry:
    """The state of a prompt that has passed no layer.

    `window` is the policies' window, and `packed_size` bounds what they keep of a layer over all
    heads.
    """

    def local(model: Model, tokens: Array) -> PrefillCarry:
        config, dtype = model.config, model.dtype
        num_tokens = _padded(tokens.shape[0], block)
        slots = model.slots_per_device
        keys = jnp.zeros((slots, num_tokens, config.head_dim), dtype)
        queries = (slots, config.group_size, min(window, num_tokens), config.head_dim)
        # What the policy may keep is bounded over all heads, and by what the slots hold.
        size = min(packed_size, slots * num_tokens)
        packed = jnp.zeros((config.num_layers, size, config.head_dim), dtype)
        integers = partial(jnp.zeros, dtype=jnp.int32)
        return PrefillCarry(
            model.embedded(jnp.pad(tokens, (0, num_tokens - tokens.shape[0]))),
            keys,
            keys,
            jnp.zeros(queries, dtype),
            CompressedPrefix(
                packed,
                packed,
                integers(packed.shape[:2]),
                integers((config.num_layers, slots)),
                integers((config.num_layers, config.num_kv_heads)),
                jnp.zeros(config.vocab_size),
            ),
        )

    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(partition_specs(model), PartitionSpec()),
        out_specs=PrefillCarry.partition(),
        check_vma=False,
    )
    return run(model, tokens)


@partial(jax.jit, static_argnames=("mesh", "policies", "block"), donate_argnums=1)
def advance_prefill(
    model: Model,
    state: PrefillCarry,
    length: Int[Array, ""],
    budgets: Int[Array, "L K"],
    policy: Int[Array, ""],
    units: tuple[Int[Array, ""], Int[Array, ""]],
    head_of_slot: Int[Array, "L PC"],
    first_slot: Int[Array, "L K"],
    *,
    mesh: Mesh,
    policies: tuple[Policy, ...],
    block: int,
) -> PrefillCarry:
    """Runs the units from the first to before the second of `units`, at least one.

    A unit is a block of `block` tokens in one layer; `num_units` tells how many there are. The
    prompt has `length` tokens, and `policies[policy]` keeps `budgets` of them.
    """

    def local(
        model: Model, state: PrefillCarry, head_of_slot: Array, *whole: Array
    ) -> PrefillCarry:
        return _advance_local(model, state, head_of_slot, *whole, policies=policies, block=block)

    whole = PartitionSpec()
    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(
            partition_specs(model),
            PrefillCarry.partition(),
            _BY_DEVICE,
            *(whole,) * 6,
        ),
        out_specs=PrefillCarry.partition(),
        check_vma=False,
    )
    return run(model, state, head_of_slot, first_slot, length, budgets, policy, *units)


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
    """How likely the prompt's own tokens were: those that follow a block of `block` positions.

    `hidden` is that of a prefill that has passed all layers. As `Sampled`, as if the tokens had
    been chosen; what is said of the last token of the prompt and of the padding means nothing.
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


def num_units(num_layers: int, num_tokens: int, block: int) -> int:
    """Units of a prompt's prefill."""
    return num_layers * -(-num_tokens // block)


def _padded(num_tokens: int, block: int) -> int:
    """Tokens of the state's arrays: whole blocks of queries, and of keys."""
    padded = round_up(num_tokens, block)
    return padded if padded <= KEY_BLOCK else round_up(padded, KEY_BLOCK)


def _advance_local(
    model: Model,
    state: PrefillCarry,
    head_of_slot: Int[Array, "L C"],
    first_slot: Int[Array, "L K"],
    length: Int[Array, ""],
    budgets: Int[Array, "L K"],
    policy: Int[Array, ""],
    start: Int[Array, ""],
    stop: Int[Array, ""],
    *,
    policies: tuple[Policy, ...],
    block: int,
) -> PrefillCarry:
    """The part of one device, inside `shard_map`."""
    num_layers, slots = head_of_slot.shape
    num_blocks = (length + block - 1) // block
    first, last = start // num_blocks, (stop - 1) // num_blocks
    slot = jax.lax.axis_index(TENSOR_AXIS) * slots + jnp.arange(slots)
    # The prompt belongs to no replica yet: the first one speaks for the head.
    speaks = jnp.take_along_axis(first_slot, jnp.maximum(head_of_slot, 0), 1) == slot

    def run_layer(index: Array, state: PrefillCarry) -> PrefillCarry:
        layer = model.layer(index)

        def run_block(i: Array, state: PrefillCarry) -> PrefillCarry:
            at = i * block

            def attend(q: Array, k: Array, v: Array, cache: None, _: None) -> tuple[Any, None, Any]:
                keys = jax.lax.dynamic_update_slice_in_dim(state.k, k.swapaxes(0, 1), at, 1)
                values = jax.lax.dynamic_update_slice_in_dim(state.v, v.swapaxes(0, 1), at, 1)
                out = attend_to_prompt(q, keys, values, at)
                out = jnp.where(speaks[index][:, None, None], out, 0)
                window = _add_to_window(state.window, q, at, length)
                return out, cache, (keys, values, window)

            x = jax.lax.dynamic_slice_in_dim(state.hidden, at, block)
            angles = model.angles(at + jnp.arange(block))
            x, _, (k, v, window) = layer(x, angles, attend, None, None)
            hidden = jax.lax.dynamic_update_slice_in_dim(state.hidden, x, at, 0)
            return PrefillCarry(hidden, k, v, window, state.prefix)

        begin = jnp.where(index == first, start % num_blocks, 0)
        end = jnp.where(index == last, (stop - 1) % num_blocks + 1, num_blocks)
        state = jax.lax.fori_loop(begin, end, run_block, state)

        def compress() -> tuple[Array, ...]:
            choices = [
                partial(_keep, state, choice, first_slot[index], length, budgets[index])
                for choice in policies
            ]
            keep = jax.lax.switch(policy, choices)
            packed = _pack(state.k, state.v, keep, head_of_slot[index], state.prefix.k.shape[1])
            return *packed, jnp.sum(keep, 1)

        # Of a layer that is not done nothing is kept yet: what is written here is overwritten.
        prefix = state.prefix
        packs = (prefix.k, prefix.v, prefix.positions, prefix.slot_lengths, prefix.head_lengths)
        kept = jax.lax.cond(
            end == num_blocks, compress, lambda: tuple(jnp.zeros_like(x[0]) for x in packs)
        )
        k, v, positions, slot_lengths, head_lengths = (
            jax.lax.dynamic_update_index_in_dim(pack, new, index, 0)
            for pack, new in zip(packs, kept, strict=True)
        )
        prefix = CompressedPrefix(k, v, positions, slot_lengths, head_lengths, prefix.logits)
        return replace(state, prefix=prefix)

    state = jax.lax.fori_loop(first, last + 1, run_layer, state)
    x = jax.lax.dynamic_slice_in_dim(state.hidden, length - 1, 1)
    logits = jax.lax.cond(
        stop == num_layers * num_blocks, lambda: model.logits(x)[0], lambda: state.prefix.logits
    )
    return replace(state, prefix=replace(state.prefix, logits=logits))


def _add_to_window(
    window: Float[Array, "C G w H"],
    q: Float[Array, "b C G H"],
    at: Int[Array, ""],
    length: Int[Array, ""],
) -> Float[Array, "C G w H"]:
    """Takes those of a block's queries that are among the prompt's last."""
    size = window.shape[2]
    place = at + jnp.arange(q.shape[0]) - window_start(length, size)
    place = jnp.where(place < 0, size, place)  # beyond: dropped
    return window.at[:, :, place].set(q.transpose(1, 2, 0, 3), mode="drop")


def _keep(
    state: PrefillCarry,
    policy: Policy,
    first_slot: Int[Array, "K"],
    length: Int[Array, ""],
    budgets: Int[Array, "K"],
) -> Bool[Array, "K T"]:
    """What a policy keeps of the present layer, for all heads on every device."""
    scores = policy.scorer(state.window, state.k, length, jnp.min(budgets))
    scores = jax.lax.all_gather(scores, TENSOR_AXIS, tiled=True)
    return policy.select(scores[first_slot], length, budgets)


def _pack(
    k: Float[Array, "C T H"],
    v: Float[Array, "C T H"],
    keep: Bool[Array, "K T"],
    head_of_slot: Int[Array, "C"],
    size: int,
) -> tuple[Array, Array, Array, Array]:
    """The kept keys, values and positions of this device's slots, one after another."""
    num_tokens = k.shape[1]
    kept = keep[head_of_slot] & (head_of_slot >= 0)[:, None]
    index = jnp.nonzero(kept.reshape(-1), size=size, fill_value=0)[0]
    slot, position = index // num_tokens, index % num_tokens
    return k[slot, position], v[slot, position], position, jnp.sum(kept, 1)


@partial(jax.jit, static_argnames="mesh", donate_argnums=0)
def insert(
    cache: KVCache,
    prefix: CompressedPrefix,
    row: Int[Array, ""],
    page_table: Int[Array, "L PC max_pages"],
    lengths: Int[Array, "L PC"],
    token_ids: Int[Array, "S"],
    num_known: Int[Array, ""],
    *,
    mesh: Mesh,
) -> KVCache:
    """Copies a prefix into the pages of a row; slots of length 0 own nothing and write nothing.

    The first `num_known` of `token_ids` are the prompt and what has been generated so far.
    """
    run = jax.shard_map(
        _insert_local,
        mesh=mesh,
        in_specs=(
            KVCache.partition(),
            CompressedPrefix.partition(),
            _BY_DEVICE,
            _BY_DEVICE,
            *(PartitionSpec(),) * 3,
        ),
        out_specs=KVCache.partition(),
        check_vma=False,
    )
    return run(cache, prefix, page_table, lengths, row, token_ids, num_known)


def _insert_local(
    cache: KVCache,
    prefix: CompressedPrefix,
    page_table: Array,
    lengths: Array,
    row: Array,
    token_ids: Array,
    num_known: Array,
) -> KVCache:
    num_pages, page_size, width = cache.k_pages.shape
    num_layers, size, _ = prefix.k.shape
    ends = jnp.cumsum(prefix.slot_lengths, axis=1)
    item = jnp.arange(size)
    slot = jnp.sum(item[:, None] >= ends[:, None], axis=-1)
    is_kept = slot < ends.shape[1]
    slot = jnp.minimum(slot, ends.shape[1] - 1)
    layer = jnp.arange(num_layers)[:, None]
    at = item - (ends - prefix.slot_lengths)[layer, slot]
    owned = is_kept & (lengths[layer, slot] > 0)
    page = page_table[layer, slot, jnp.where(owned, at // page_size, 0)]
    page = jnp.where(owned, page, num_pages).reshape(-1)  # beyond the pool: dropped
    at = (at % page_size).reshape(-1)
    return KVCache(
        cache.k_pages.at[page, at].set(prefix.k.reshape(-1, width), mode="drop"),
        cache.v_pages.at[page, at].set(prefix.v.reshape(-1, width), mode="drop"),
        cache.page_table.at[:, row].set(page_table),
        cache.lengths.at[:, row].set(lengths),
        cache.token_ids.at[row].set(token_ids),
        cache.num_known.at[row].set(num_known),
    )


@partial(jax.jit, donate_argnums=0)
def release(lengths: Int[Array, "L B PC"], row: Int[Array, ""]) -> Int[Array, "L B PC"]:
    """Takes all ownership of a row away."""
    return lengths.at[:, row].set(0)
