"""What a prefill carries from one program to the next, and how it begins."""

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Lowered
from jaxtyping import Array, Float, Int

from fairkv_jax.attention import KEY_BLOCK
from fairkv_jax.cache import LAYERS_BY_DEVICE
from fairkv_jax.compress.budgets import MaxKept
from fairkv_jax.compress.contract import (
    LayerShape,
    Method,
    distinct_scorers,
)
from fairkv_jax.models.model import Model
from fairkv_jax.shapes import TENSOR_AXIS, round_up
from fairkv_jax.sharding.load_weights import partition_specs
from fairkv_jax.sharding.step_shapes import StepShapes


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CompressedPrefix:
    """The compressed cache of one prompt, or of its suffix, ready to be inserted into a row.

    Every device packs the kept tokens of its slots, layer after layer, slot after slot. R is how
    many it has room for. `positions` counts from the prompt's start, also in a suffix.
    """

    k: Float[Array, "PR H"]
    v: Float[Array, "PR H"]
    positions: Int[Array, "PR"]
    slot_lengths: Int[Array, "L PC"]
    """Kept tokens of every slot, replicas included; 0 in empty slots."""
    head_lengths: Int[Array, "L K"]
    logits: Float[Array, "V"]
    """Logits of the token that follows the prompt, float32."""

    @classmethod
    def partition(cls) -> "CompressedPrefix":
        """Returns how each array is split over the mesh."""
        whole: Any = PartitionSpec()
        split: Any = PartitionSpec(TENSOR_AXIS)
        return cls(split, split, split, LAYERS_BY_DEVICE, whole, whole)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PrefillCarry:
    """A prompt on its way through the layers; donated to every program that continues it.

    It may be several packed prompts, one after the other, which do not see each other.
    """

    first_position: Int[Array, ""]
    """Position of the first token: 0, or for a suffix the number of tokens before it."""
    begins: Int[Array, "T"]
    """Index of the first token of each token's own prompt."""
    hidden: Float[Array, "T D"]
    """The current layer's inputs; its outputs for tokens of chunks that it has run."""
    k: Float[Array, "PC T H"]
    v: Float[Array, "PC T H"]
    """Keys and values of the current layer, for tokens of chunks that it has run."""
    stats: tuple[Any, ...]
    """Per distinct scorer, its statistics of the current layer; only the chosen one's are used."""
    prefix: CompressedPrefix

    @classmethod
    def partition(cls) -> "PrefillCarry":
        """Returns how each array is split over the mesh, as a prefix of the carry's pytree."""
        whole: Any = PartitionSpec()
        split: Any = PartitionSpec(TENSOR_AXIS)
        return cls(whole, whole, whole, split, split, split, CompressedPrefix.partition())

    def whole_layer(
        self, layer: Int[Array, ""]
    ) -> tuple[Float[Array, "C T H"], Float[Array, "C T H"]]:
        """Returns a layer's keys and values of a prompt that is kept whole, inside `shard_map`.

        Those at and past the prompt's length, and of empty slots, are undefined but finite.
        """
        lengths = self.prefix.slot_lengths
        starts = jnp.cumsum(lengths.reshape(-1)).reshape(lengths.shape) - lengths

        def of_slot(x: Float[Array, "R H"], start: Array) -> Float[Array, "T H"]:
            return jax.lax.dynamic_slice_in_dim(x, start, self.k.shape[1])

        slots = jax.vmap(of_slot, in_axes=(None, 0))
        return slots(self.prefix.k, starts[layer]), slots(self.prefix.v, starts[layer])


@dataclass(frozen=True)
class PrefillShapes:
    """What decides the shapes of a prefill's programs."""

    steps: StepShapes
    bucket: int
    """The longest prompt that the programs take, in tokens."""
    chunk_size: int
    methods: tuple[Method, ...]
    max_kept: MaxKept
    has_prefix: bool = False
    """Whether the prompts are suffixes of prefixes in the KV cache."""
    max_repetition: int = 0
    """Most tokens of a repetition of a part of a prompt; 0 where the method needs none."""

    @cached_property
    def carry(self) -> "PrefillCarry":
        """The carry between two programs."""
        shapes = jax.eval_shape(
            partial(
                start_prefill,
                mesh=self.steps.mesh,
                chunk_size=self.chunk_size,
                methods=self.methods,
                max_kept=self.max_kept,
            ),
            self.steps.model,
            self.tokens,
            self.steps.number,
            self.tokens,
        )
        return self.steps.placed(shapes, PrefillCarry.partition())

    @property
    def tokens(self) -> Any:
        """A padded prompt."""
        return self.steps.array((self.bucket,))


def lower_start_prefill(shapes: PrefillShapes) -> Lowered:
    """Lowers `start_prefill`."""
    return shapes.steps.lower(
        start_prefill,
        shapes.steps.model,
        shapes.tokens,
        shapes.steps.number,
        shapes.tokens,
        mesh=shapes.steps.mesh,
        chunk_size=shapes.chunk_size,
        methods=shapes.methods,
        max_kept=shapes.max_kept,
    )


@partial(jax.jit, static_argnames=("mesh", "chunk_size", "methods", "max_kept"))
def start_prefill(
    model: Model,
    tokens: Int[Array, "T"],
    first_position: Int[Array, ""],
    begins: Int[Array, "T"],
    *,
    mesh: Mesh,
    chunk_size: int,
    methods: tuple[Method, ...],
    max_kept: MaxKept,
) -> PrefillCarry:
    """Embeds a prompt and allocates the carry of its prefill.

    `first_position` and `begins` are those of the carry. `max_kept` must hold for the prompt.
    """

    def local(model: Model, tokens: Array, first_position: Array, begins: Array) -> PrefillCarry:
        config = model.config
        num_tokens = _padded_tokens(tokens.shape[0], chunk_size)
        shape = layer_shape(model, num_tokens)
        keys = jnp.zeros((shape.num_slots, num_tokens, config.head_dim), model.dtype)
        # The bound is over all heads; this device's slots cannot hold more than all their tokens.
        most = config.num_layers * shape.num_slots * num_tokens
        # A layer is packed as a block, which also covers what follows, see `with_layer`.
        size = min(max_kept.in_all_layers, most)
        size += max_kept.in_layer_of(shape.num_slots, num_tokens)
        whole = config.num_layers * min(shape.num_slots, config.num_kv_heads) * tokens.shape[0]
        if max_kept.in_all_layers >= whole:
            size = max(size, whole + num_tokens)  # `whole_layer` reads past a slot's last token
        packed = jnp.zeros((size, config.head_dim), model.dtype)
        integers = partial(jnp.zeros, dtype=jnp.int32)
        return PrefillCarry(
            first_position,
            jnp.pad(begins, (0, num_tokens - len(begins))),
            model.embedded(jnp.pad(tokens, (0, num_tokens - tokens.shape[0]))),
            keys,
            keys,
            tuple(scorer.init(shape) for scorer in distinct_scorers(methods)),
            CompressedPrefix(
                packed,
                packed,
                integers(size),
                integers((config.num_layers, shape.num_slots)),
                integers((config.num_layers, config.num_kv_heads)),
                jnp.zeros(config.vocab_size),
            ),
        )

    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(partition_specs(model), *(PartitionSpec(),) * 3),
        out_specs=PrefillCarry.partition(),
        check_vma=False,
    )
    return run(model, tokens, first_position, begins)


def lower_gather_kept(shapes: PrefillShapes) -> Lowered:
    """Lowers `gather_kept`."""
    prefix = shapes.carry.prefix
    return shapes.steps.lower(
        gather_kept, prefix.positions, prefix.slot_lengths, mesh=shapes.steps.mesh
    )


@partial(jax.jit, static_argnames="mesh")
def gather_kept(
    positions: Int[Array, "PR"], slot_lengths: Int[Array, "L PC"], *, mesh: Mesh
) -> tuple[Int[Array, "PR"], Int[Array, "L PC"]]:
    """Copies two arrays of a `CompressedPrefix` to every device.

    A process can read an array only if its own devices hold all of it.
    """
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.lax.with_sharding_constraint((positions, slot_lengths), whole)


def _padded_tokens(num_tokens: int, chunk_size: int) -> int:
    """Returns the tokens of the carry's arrays: whole chunks of queries, and whole key blocks."""
    padded = round_up(num_tokens, chunk_size)
    return padded if padded <= KEY_BLOCK else round_up(padded, KEY_BLOCK)


def layer_shape(model: Model, num_tokens: int) -> LayerShape:
    """Returns the sizes of this device's part of a layer, inside `shard_map`."""
    config = model.config
    return LayerShape(
        model.slots_per_device, config.group_size, config.head_dim, num_tokens, model.dtype
    )
