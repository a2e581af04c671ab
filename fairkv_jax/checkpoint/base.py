"""What every checkpoint format offers: a configuration, tensors in head order, a tokenizer."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from fairkv_jax.config import ModelConfig
from fairkv_jax.plan import Profile
from fairkv_jax.tokenizer import Tokenizer

PROFILE_FILE = "profile.json"


class CheckpointError(ValueError):
    """A checkpoint cannot be read; the message says which, why, and the way out."""


class Stored(NamedTuple):
    """How a tensor lies on disk, e.g. as "Q4_1"."""

    kind: str
    num_bytes: int


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in head order, of which nothing is read before it is asked for."""

    shape: tuple[int, ...]
    block: int
    """Rows of the leading axis that are best read at once, so that no byte is read twice."""
    read: Callable[[int, int], np.ndarray]
    """Rows [start, stop): float32, float16 or bfloat16, read-only, perhaps a strided view."""

    def whole(self) -> np.ndarray:
        """All rows, contiguous."""
        return np.ascontiguousarray(self.read(0, self.shape[0]))


class Checkpoint(Protocol):
    """Model weights on disk, read lazily under canonical names.

    The names and shapes are those of `layout.tensor_shapes`, whatever the file calls them.
    """

    name: str
    """The model's name, as a server announces it."""
    config: ModelConfig

    @property
    def profile(self) -> Profile | None:
        """The head profile that lies beside the weights, if one does."""
        ...

    def names(self) -> tuple[str, ...]:
        """The canonical names of all tensors, in the order of the layers."""
        ...

    def lazy(self, name: str) -> LazyTensor:
        """One tensor in head order; what is wrong with its bytes shows as it is read.

        Raises:
            CheckpointError: there is no such tensor.
        """
        ...

    def tensor(self, name: str) -> np.ndarray:
        """The same, read as a whole: float32, or the file's own float16 or bfloat16."""
        ...

    def stored(self, name: str) -> Stored:
        """How the tensor is stored; reads none of it."""
        ...

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the model was trained with."""
        ...


def read_profile(folder: Path) -> Profile | None:
    """The profile in a folder, None where there is none; raises CheckpointError if it is broken."""
    path = folder / PROFILE_FILE
    if not path.is_file():
        return None
    try:
        return Profile.from_json(path.read_text(encoding="utf-8"))
    except (OSError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}: measure a new profile") from error


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
