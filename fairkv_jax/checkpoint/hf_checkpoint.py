"""A Hugging Face model folder as a `Checkpoint`: config.json, *.safetensors, tokenizer.json."""

from functools import partial
from pathlib import Path

import numpy as np

from fairkv_jax.checkpoint.base import (
    CheckpointError,
    LazyTensor,
    Stored,
    check_tokenizer,
    read_profile,
)
from fairkv_jax.checkpoint.hf_config import read_config
from fairkv_jax.checkpoint.hf_tokenizer import build_tokenizer
from fairkv_jax.checkpoint.layout import head_order, split_name, stored_shape, tensor_shapes
from fairkv_jax.checkpoint.safetensors_file import open_safetensors
from fairkv_jax.plan import Profile
from fairkv_jax.tokenizer import Tokenizer

_HF_NAMES = {
    "embed": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "unembed": "lm_head.weight",
    "attn_norm": "model.layers.{}.input_layernorm.weight",
    "q": "model.layers.{}.self_attn.q_proj.weight",
    "k": "model.layers.{}.self_attn.k_proj.weight",
    "v": "model.layers.{}.self_attn.v_proj.weight",
    "o": "model.layers.{}.self_attn.o_proj.weight",
    "mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
    "gate": "model.layers.{}.mlp.gate_proj.weight",
    "up": "model.layers.{}.mlp.up_proj.weight",
    "down": "model.layers.{}.mlp.down_proj.weight",
    "q_bias": "model.layers.{}.self_attn.q_proj.bias",
    "k_bias": "model.layers.{}.self_attn.k_proj.bias",
    "v_bias": "model.layers.{}.self_attn.v_proj.bias",
    "q_norm": "model.layers.{}.self_attn.q_norm.weight",
    "k_norm": "model.layers.{}.self_attn.k_norm.weight",
}


class HFCheckpoint:
    """A model in the published layout, mapped into memory and read tensor by tensor.

    Raises:
        CheckpointError: a file cannot be read, the family is not supported, or the tensors are
            not those that config.json announces.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.name = folder.resolve().name
        self.config = read_config(folder)
        self._files = open_safetensors(folder)
        self._shapes = tensor_shapes(self.config)
        self._check_tensors()

    @property
    def profile(self) -> Profile | None:
        return read_profile(self._folder)

    def names(self) -> tuple[str, ...]:
        return tuple(self._shapes)

    def lazy(self, name: str) -> LazyTensor:
        if name not in self._shapes:
            raise CheckpointError(f"{self._folder} has no tensor {name!r}: see names()")
        stored = hf_name(name)
        return head_order(name, self._shapes[name], partial(self._files[stored].read, stored))

    def tensor(self, name: str) -> np.ndarray:
        return self.lazy(name).whole()

    def stored(self, name: str) -> Stored:
        info = self._files[hf_name(name)].tensors[hf_name(name)]
        return Stored(info.kind, info.num_bytes)

    def tokenizer(self) -> Tokenizer:
        return check_tokenizer(build_tokenizer(self._folder), self.config, self._folder)

    def _check_tensors(self) -> None:
        """The files must hold the model's tensors in their shapes, and none beside them."""
        expected = {hf_name(name): (name, shape) for name, shape in self._shapes.items()}
        # Some folders store the tied matrix twice, some the tables of RoPE: neither is read.
        ignored = {hf_name("unembed")} if self.config.tie_word_embeddings else set()
        if missing := [name for name in expected if name not in self._files]:
            raise CheckpointError(
                f"{self._folder} lacks {len(missing)} of {len(expected)} tensors, the first "
                f"{missing[0]!r}: fetch it again, whole"
            )
        known = expected.keys() | ignored
        extra = [name for name in self._files if name not in known]
        if extra := [name for name in extra if not name.endswith("rotary_emb.inv_freq")]:
            raise CheckpointError(
                f"{self._folder} holds {len(extra)} tensors that the family "
                f"{self.config.architecture} is not known to use, the first {extra[0]!r}: "
                "this variant is not supported"
            )
        for stored, (name, shape) in expected.items():
            found = self._files[stored].tensors[stored].shape
            if found != stored_shape(name, shape):
                raise CheckpointError(
                    f"{self._folder}: tensor {stored!r} has the shape {found}, config.json calls "
                    f"for {stored_shape(name, shape)}: the two do not belong together"
                )


def hf_name(name: str) -> str:
    """The name of a canonical tensor in a Hugging Face folder."""
    kind, index = split_name(name)
    return _HF_NAMES[kind].format(index)
