"""The tensors of a decoder, each declared once: shape, logical axes, and names in published files.

Everything that needs to know a tensor derives it from its `ParamSpec`: the checkpoint readers take
names and stored shapes from it, the model the shapes and axes of its arrays, the loader the array
that a tensor fills, and `device_bytes` the memory that the weights take on each device.

Checkpoints are read in *head order*: heads are axes, grouped by KV head, and the model axis is
last. Published files store [out, in] matrices instead, with the heads flattened into rows or
columns. Axis letters are those of `shapes.py`:

    embed, lm_head               [V, D]          layers.{l}.gate, up, down    [F, D]
    norm                         [D]             layers.{l}.q, o              [K, G, H, D]
    layers.{l}.attn_norm         [D]             layers.{l}.k, v              [K, H, D]
    layers.{l}.mlp_norm          [D]             layers.{l}.q_bias            [K, G, H]
    layers.{l}.q_norm, k_norm    [H]             layers.{l}.k_bias, v_bias    [K, H]

Biases, norms of heads and `lm_head` exist only if the model has them.

This module does not import JAX, so that checkpoints can be read and memory planned without it.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import NamedTuple, Protocol

from fairkv_jax.config import ModelConfig
from fairkv_jax.shapes import round_up

Axes = tuple[str, ...]

SLOT = "slot"
"""KV heads in a checkpoint; on the devices, the head slots that hold them."""
GROUP, HEAD_DIM, MLP, VOCAB, MODEL = "group", "head_dim", "mlp", "vocab", "model"
GATE_UP = "gate_up"
"""In the model's arrays only: the gate and the up projection of an MLP, in this order."""

_PARTS = {SLOT: "heads", MLP: "mlp", VOCAB: "vocabulary"}
"""Parts of the model by the axis along which the devices split them."""
_SCALE_BYTES = 4


class Within(NamedTuple):
    """The place of a tensor in an array of several: entries of the axis along which they lie."""

    axis: str
    entries: slice | int


@dataclass(frozen=True)
class ParamSpec:
    """One tensor of a checkpoint, in head order.

    `outputs` names the axes that a product with the tensor puts out. They come first in published
    matrices, and int8 weights have one scale for each of their entries. Vectors, such as norms and
    biases, have no outputs and always stay in floats.
    """

    name: str
    """The canonical name, for example "layers.3.q"."""
    axes: Axes
    shape: tuple[int, ...]
    array: str
    """The path of the model's array that holds it, for example "layers.attention.qkv"."""
    hf_name: str
    gguf_name: str
    outputs: Axes = ()
    within: Within | None = None
    """Which part of the array it fills; None if it fills the array alone."""
    layer: int | None = None
    """The layer's index; None for tensors outside the layers."""

    @property
    def inputs(self) -> Axes:
        """The axes that a product with the tensor contracts."""
        return tuple(axis for axis in self.axes if axis not in self.outputs)

    @property
    def is_matrix(self) -> bool:
        return bool(self.outputs)

    @property
    def is_stored_transposed(self) -> bool:
        """Whether the published matrix has the model axis first instead of last."""
        return self.outputs == (MODEL,)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape in published files: [out, in] for a matrix, [out] for a vector."""
        if not self.is_matrix:
            return (math.prod(self.shape),)
        return (self._size(self.outputs), self._size(self.inputs))

    @property
    def array_axes(self) -> Axes:
        """The axes in the order of the model's array.

        Contracted axes come first: XLA's CPU backend is a quarter slower at the transposed product
        of a small batch. Matrices over the vocabulary keep one row per token, to be looked up.
        """
        if VOCAB in self.axes or not self.is_matrix:
            return self.axes
        return (*self.inputs, *self.array_outputs)

    @property
    def array_outputs(self) -> Axes:
        """The output axes of the model's array."""
        is_gate_or_up = self.within is not None and self.within.axis == GATE_UP
        return (GATE_UP, *self.outputs) if is_gate_or_up else self.outputs

    def size_of(self, axis: str) -> int:
        """The size of an axis, 1 if the tensor does not have it."""
        return self.shape[self.axes.index(axis)] if axis in self.axes else 1

    def at_layer(self, layer: int) -> "ParamSpec":
        """The same tensor of one layer, with the layer's index in all names."""
        names = {key: getattr(self, key).format(layer) for key in ("name", "hf_name", "gguf_name")}
        return replace(self, layer=layer, **names)

    def _size(self, axes: Axes) -> int:
        return math.prod(self.size_of(axis) for axis in axes)


@dataclass(frozen=True)
class ArraySpec:
    """One array of the model: a tensor, or several that lie side by side along one axis."""

    axes: Axes
    shape: tuple[int, ...]
    outputs: Axes
    """The axes over which int8 weights have scales; () for arrays that stay in floats."""

    def padded_shape(self, num_slots: int, num_devices: int) -> tuple[int, ...]:
        """The shape over all devices; see `padded_sizes`."""
        return tuple(padded_sizes(self.axes, self.shape, num_slots, num_devices).values())


class ModelSizes(Protocol):
    """The sizes that set the shapes of a decoder's tensors, as in `ModelConfig`."""

    @property
    def num_layers(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...


def param_specs(config: ModelConfig) -> dict[str, ParamSpec]:
    """Every tensor of a model by its canonical name, in the order in which files are read."""
    specs = decoder_params(
        config,
        qkv_bias=config.qkv_bias,
        qk_norm=config.qk_norm,
        tie_word_embeddings=config.tie_word_embeddings,
    )
    return {spec.name: spec for spec in specs}


def decoder_params(
    sizes: ModelSizes,
    *,
    qkv_bias: bool = False,
    qk_norm: bool = False,
    tie_word_embeddings: bool = True,
) -> Iterator[ParamSpec]:
    """The tensors of a decoder of Llama's structure, layer by layer."""
    D, V = sizes.hidden_size, sizes.vocab_size
    rows = partial(ParamSpec, axes=(VOCAB, MODEL), shape=(V, D), outputs=(VOCAB,))
    embed_hf, lm_head_hf = "model.embed_tokens.weight", "lm_head.weight"
    yield rows("embed", array="embed", hf_name=embed_hf, gguf_name="token_embd.weight")
    layer = (*_attention_params(sizes, qkv_bias=qkv_bias, qk_norm=qk_norm), *_mlp_params(sizes))
    for index in range(sizes.num_layers):
        yield from (spec.at_layer(index) for spec in layer)
    yield ParamSpec("norm", (MODEL,), (D,), "norm.scale", "model.norm.weight", "output_norm.weight")
    if not tie_word_embeddings:
        yield rows("lm_head", array="lm_head", hf_name=lm_head_hf, gguf_name="output.weight")


def _attention_params(sizes: ModelSizes, *, qkv_bias: bool, qk_norm: bool) -> Iterator[ParamSpec]:
    """One layer's attention. An array `qkv` stacks each slot's query heads, key and value head."""
    D, K, H = sizes.hidden_size, sizes.num_kv_heads, sizes.head_dim
    G = sizes.num_heads // K
    query, head = (SLOT, GROUP, HEAD_DIM), (SLOT, HEAD_DIM)
    qkv = (("q", query, (K, G, H), slice(G)), ("k", head, (K, H), G), ("v", head, (K, H), G + 1))
    hf, gguf = "model.layers.{}.self_attn", "blk.{}.attn"
    yield ParamSpec(
        "layers.{}.attn_norm",
        (MODEL,),
        (D,),
        "layers.attn_norm.scale",
        "model.layers.{}.input_layernorm.weight",
        "blk.{}.attn_norm.weight",
    )
    for name, axes, shape, heads in qkv:
        yield ParamSpec(
            f"layers.{{}}.{name}",
            (*axes, MODEL),
            (*shape, D),
            "layers.attention.qkv",
            f"{hf}.{name}_proj.weight",
            f"{gguf}_{name}.weight",
            outputs=axes,
            within=Within(GROUP, heads),
        )
    for name, axes, shape, heads in qkv if qkv_bias else ():
        yield ParamSpec(
            f"layers.{{}}.{name}_bias",
            axes,
            shape,
            "layers.attention.bias",
            f"{hf}.{name}_proj.bias",
            f"{gguf}_{name}.bias",
            within=Within(GROUP, heads),
        )
    for name in ("q_norm", "k_norm") if qk_norm else ():
        yield ParamSpec(
            f"layers.{{}}.{name}",
            (HEAD_DIM,),
            (H,),
            f"layers.attention.{name}.scale",
            f"{hf}.{name}.weight",
            f"{gguf}_{name}.weight",
        )
    yield ParamSpec(
        "layers.{}.o",
        (*query, MODEL),
        (K, G, H, D),
        "layers.attention.out",
        f"{hf}.o_proj.weight",
        f"{gguf}_output.weight",
        outputs=(MODEL,),
    )


def _mlp_params(sizes: ModelSizes) -> Iterator[ParamSpec]:
    """One layer's gated MLP and the norm before it.

    An array `gate_up` holds both projections of the input: XLA's GPU compiler merges their two
    products into one, and would copy the weights of two arrays side by side in every step.
    """
    D, F = sizes.hidden_size, sizes.intermediate_size
    yield ParamSpec(
        "layers.{}.mlp_norm",
        (MODEL,),
        (D,),
        "layers.mlp_norm.scale",
        "model.layers.{}.post_attention_layernorm.weight",
        "blk.{}.ffn_norm.weight",
    )
    for name, array, outputs, within in (
        ("gate", "gate_up", MLP, Within(GATE_UP, 0)),
        ("up", "gate_up", MLP, Within(GATE_UP, 1)),
        ("down", "down", MODEL, None),
    ):
        yield ParamSpec(
            f"layers.{{}}.{name}",
            (MLP, MODEL),
            (F, D),
            f"layers.mlp.{array}",
            f"model.layers.{{}}.mlp.{name}_proj.weight",
            f"blk.{{}}.ffn_{name}.weight",
            outputs=(outputs,),
            within=within,
        )


def array_specs(specs: Iterable[ParamSpec]) -> dict[str, ArraySpec]:
    """The arrays of a model by path, without the layer axis of those in the layers."""
    arrays: dict[str, ArraySpec] = {}
    for path, group in groupby(specs, key=lambda spec: spec.array):
        first, *others = group
        sizes = {axis: first.size_of(axis) for axis in first.array_axes}
        if first.within is not None:
            sizes[first.within.axis] += sum(spec.size_of(first.within.axis) for spec in others)
        array = ArraySpec(first.array_axes, tuple(sizes.values()), first.array_outputs)
        arrays.setdefault(path, array)
    return arrays


def device_bytes(
    config: ModelConfig,
    slots_per_device: int,
    num_devices: int,
    itemsize: int,
    *,
    int8: bool = False,
) -> dict[str, int]:
    """Bytes of the weights on every device, by part of the model.

    All devices hold the same number of bytes, because JAX shards evenly: axes are padded, and
    every device has `slots_per_device` head slots in each layer. `itemsize` is the size of a
    float weight; with `int8` it applies to vectors only.
    """
    num_bytes = dict.fromkeys((*_PARTS.values(), "norms"), 0)

    def count(axes: Axes, sizes: dict[str, int]) -> int:
        total = math.prod(sizes[axis] for axis in axes)
        return total // num_devices if any(axis in _PARTS for axis in axes) else total

    for spec in param_specs(config).values():
        num_slots = slots_per_device * num_devices
        sizes = padded_sizes(spec.axes, spec.shape, num_slots, num_devices)
        part = next((_PARTS[axis] for axis in spec.axes if axis in _PARTS), "norms")
        values = count(spec.axes, sizes)
        if int8 and spec.is_matrix:
            num_bytes[part] += values + count(spec.outputs, sizes) * _SCALE_BYTES
        else:
            num_bytes[part] += values * itemsize
    return num_bytes


def padded_sizes(
    axes: Axes, shape: tuple[int, ...], num_slots: int, num_devices: int
) -> dict[str, int]:
    """The sizes of an array over all devices, by axis.

    The `slot` axis has `num_slots` head slots (P*C) in place of KV heads; the other axes that are
    split over the devices are padded to divide evenly.
    """
    sizes = dict(zip(axes, shape, strict=True))
    for axis in {MLP, VOCAB} & sizes.keys():
        sizes[axis] = round_up(sizes[axis], num_devices)
    if SLOT in sizes:
        sizes[SLOT] = num_slots
    return sizes
