"""What every checkpoint format offers: a configuration, tensors in head order, a tokenizer."""

from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from fairkv_jax.config import ModelConfig
from fairkv_jax.tokenizer import Tokenizer


class CheckpointError(ValueError):
    """A checkpoint cannot be read; the message says which, why, and the way out."""


class Stored(NamedTuple):
    """How a tensor lies on disk, e.g. as "Q4_1"."""

    kind: str
    num_bytes: int


class Checkpoint(Protocol):
    """Model weights on disk, read one tensor at a time under canonical names.

    The names and shapes are those of `layout.tensor_shapes`, whatever the file calls them.
    """

    name: str
    """The model's name, as a server announces it."""
    config: ModelConfig

    def names(self) -> tuple[str, ...]:
        """The canonical names of all tensors, in the order of the layers."""
        ...

    def tensor(self, name: str) -> np.ndarray:
        """One tensor in head order: float32, or the file's own float16 or bfloat16.

        Raises:
            CheckpointError: there is no such tensor, or it cannot be read.
        """
        ...

    def stored(self, name: str) -> Stored:
        """How the tensor is stored; reads none of it."""
        ...

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the model was trained with."""
        ...


def check_tokenizer(tokenizer: Tokenizer, config: ModelConfig, path: Path) -> Tokenizer:
    """Returns the tokenizer if every id that it can give has a row in the embedding.

    Raises:
        CheckpointError: it has more tokens than the model.
    """
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the embedding only "
            f"{config.vocab_size}: the two do not belong together"
        )
    return tokenizer
