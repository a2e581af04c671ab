"""The interface of a checkpoint, and what the readers of all formats share.

A checkpoint offers a configuration, tensors in head order (see `models.params`) and a tokenizer.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Lock
from typing import NamedTuple, Protocol

import numpy as np

from fairkv_jax.config import ModelConfig
from fairkv_jax.models.params import ParamSpec
from fairkv_jax.plan import HeadScores, Profile
from fairkv_jax.tokenizer import Tokenizer

PROFILE_FILE = "profile.json"
HEAD_SCORES_FILE = "head_scores.json"
BLOCK_VALUES = 1 << 20
"""Values that are read at once: they stay in the processor's caches on their way to the devices."""

logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint cannot be read; the message names it, the reason, and what to do."""


class Stored(NamedTuple):
    """How a tensor is stored: its type, for example "Q4_1", and its bytes."""

    kind: str
    num_bytes: int


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in head order, read on demand."""

    shape: tuple[int, ...]
    block: int
    """Rows of the leading axis to read at once, so that no byte is read twice."""
    read: Callable[[int, int], np.ndarray]
    """Returns rows [start, stop) in float32, float16 or bfloat16: read-only, maybe strided."""

    def whole(self) -> np.ndarray:
        """All rows, contiguous."""
        return np.ascontiguousarray(self.read(0, self.shape[0]))


class Checkpoint(Protocol):
    """Model weights on disk, read lazily under canonical names.

    Names and shapes are those of `models.param_specs`, whatever the file calls the tensors.
    """

    name: str
    """The model's name, as the server reports it."""
    config: ModelConfig

    @property
    def profile(self) -> Profile | None:
        """The head profile stored with the weights, or None."""
        ...

    @property
    def head_scores(self) -> HeadScores | None:
        """The head scores stored with the weights, or None."""
        ...

    def names(self) -> tuple[str, ...]:
        """The canonical names of all tensors, in the order of the layers."""
        ...

    def lazy(self, name: str) -> LazyTensor:
        """One tensor in head order.

        Raises:
            CheckpointError: there is no such tensor. Damaged data raises it when they are read.
        """
        ...

    def tensor(self, name: str) -> np.ndarray:
        """The whole tensor in float32, or in the file's own float16 or bfloat16."""
        ...

    def stored(self, name: str) -> Stored:
        """How the tensor is stored; does not read it."""
        ...

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the model was trained with."""
        ...


def check_finite(values: np.ndarray, checkpoint: "Checkpoint", tensor: str) -> np.ndarray:
    """Returns values that have been read from a tensor, if they are finite numbers.

    Raises:
        CheckpointError: some are not.
    """
    is_finite = np.isfinite(values)
    if not is_finite.all():
        raise CheckpointError(
            f"{checkpoint.name}: tensor {tensor!r} holds values that are not finite numbers, "
            f"{int((~is_finite).sum()):,} of the {values.size:,} that were read: the file is "
            "damaged: fetch it again, or compare its hash"
        )
    return values


def head_order(spec: ParamSpec, read_rows: Callable[[int, int], np.ndarray]) -> LazyTensor:
    """A stored [out, in] matrix or [out] vector as a tensor in head order.

    `read_rows(start, stop)` returns rows of the stored tensor. If the tensor is stored transposed,
    it is called once, for all rows.
    """
    shape = spec.shape
    if len(shape) == 1:
        return LazyTensor(shape, shape[0], read_rows)
    if spec.is_stored_transposed:
        read_rows = _once(read_rows)
    # Stored rows (columns if transposed) for each entry of the leading axis.
    each = math.prod(shape[1:-1] if spec.is_matrix else shape[1:])

    def read(start: int, stop: int) -> np.ndarray:
        if spec.is_stored_transposed:
            rows = read_rows(0, shape[-1])[:, start * each : stop * each].T
        else:
            rows = read_rows(start * each, stop * each)
        return rows.reshape(stop - start, *shape[1:])

    block = max(1, BLOCK_VALUES // math.prod(shape[1:]))
    return LazyTensor(shape, min(block, shape[0]), read)


def _once(read_rows: Callable[[int, int], np.ndarray]) -> Callable[[int, int], np.ndarray]:
    """The same function, which keeps what it has read; several threads may call it at once."""
    read_rows, lock = cache(read_rows), Lock()

    def read(start: int, stop: int) -> np.ndarray:
        with lock:
            return read_rows(start, stop)

    return read


def context_within_window(path: Path, context: int, window: int) -> int:
    """The model's context in tokens, at most the sliding window: within it attention is full."""
    if window >= context:
        return context
    logger.warning(
        "%s: attention slides over a window of %d tokens. The context is limited to it instead of "
        "%d tokens, because the cache cannot drop tokens during decoding",
        path,
        window,
        context,
    )
    return window


def check_num_layers(path: Path, key: str, num_layers: int, num_tensors: int) -> None:
    """Checks a number of layers before anything of that size is made.

    Raises:
        CheckpointError: there are fewer tensors than layers.
    """
    if num_layers > num_tensors:
        raise CheckpointError(
            f"{path}: {key} is {num_layers:,}, but there are only {num_tensors:,} tensors: the "
            "file is damaged, or the checkpoint is not complete"
        )


def read_profile(folder: Path) -> Profile | None:
    """The profile in a folder or None; raises CheckpointError if it is damaged."""
    path = folder / PROFILE_FILE
    if not path.is_file():
        return None
    try:
        return Profile.from_json(path.read_text(encoding="utf-8"))
    except (OSError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}: measure a new profile") from error


def read_head_scores(folder: Path) -> HeadScores | None:
    """The head scores in a folder or None; raises CheckpointError if they are damaged."""
    path = folder / HEAD_SCORES_FILE
    if not path.is_file():
        return None
    try:
        return HeadScores.from_json(path.read_text(encoding="utf-8"))
    except (OSError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def check_tokenizer(tokenizer: Tokenizer, config: ModelConfig, path: Path) -> Tokenizer:
    """Returns the tokenizer if the embedding has a row for every id that it can produce.

    Raises:
        CheckpointError: the tokenizer has more tokens than the model.
    """
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the embedding only "
            f"{config.vocab_size}: the two do not belong together"
        )
    return tokenizer
