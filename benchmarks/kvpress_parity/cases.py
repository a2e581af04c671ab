"""What both halves of the comparison run: methods, sizes, and the file between the halves.

NumPy and the standard library only, since the two halves run in different environments.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Case:
    """A method of kvpress and the options with which our engine does the same."""

    method: str
    allocator: str
    options: Mapping[str, Any]
    """Keyword arguments of `LLM`, without the size."""
    epsilon: float = 0.0
    """Added to the scores of expected attention before they are scaled by the values' norms."""

    @property
    def name(self) -> str:
        name = f"{self.method}-{self.allocator}"
        return f"{name}-{self.epsilon:g}" if self.epsilon else name


@dataclass(frozen=True)
class Size:
    """How much is kept: either a ratio, which is removed, or a budget in tokens per head."""

    ratio: float | None = None
    budget: int | None = None

    @property
    def name(self) -> str:
        return f"ratio {self.ratio}" if self.budget is None else f"budget {self.budget}"

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of `LLM`."""
        return {"kv_ratio": self.ratio} if self.budget is None else {"kv_budget": self.budget}

    def ratio_for(self, case: Case, num_tokens: int) -> float:
        """Returns the ratio at which kvpress keeps this much of a prompt.

        kvpress keeps int(num_tokens * (1 - ratio)) of a head, while KVzip removes
        int(pairs * ratio) of the model: a little more is kept, or removed, so that the product is
        not rounded below its integer.
        """
        if self.budget is None:
            assert self.ratio is not None
            return self.ratio
        margin = -1e-4 if case.allocator == "model" else 0.5
        return max(0.0, 1 - (self.budget + margin) / num_tokens)


_SNAPKV = {"kv_window": 64, "kv_pooling": "avg", "kv_kernel": 5}
_RESERVE = {"kv_safeguard": "reserve", "kv_alpha_safeguard": 0.2}
_KVZIP = {"kv_replay_suffix": "\n"}


def _case(method: str, allocator: str, epsilon: float = 0.0) -> Case:
    options: dict[str, Any] = {"kv_policy": method, "kv_allocator": allocator}
    if allocator == "ada":
        options |= _RESERVE
    if method == "expected_attention":
        options |= {"kv_epsilon": epsilon}
    return Case(method, allocator, options, epsilon)


CASES = (
    Case("streaming_llm", "uniform", {"kv_policy": "streaming_llm"}),
    Case("snapkv", "uniform", {"kv_policy": "snapkv", **_SNAPKV}),
    Case("snapkv", "ada", {"kv_policy": "ada_snapkv", **_SNAPKV, **_RESERVE}),
    Case("snapkv", "critical_ada", {"kv_policy": "critical_ada", **_SNAPKV, **_RESERVE}),
    _case("expected_attention", "uniform"),
    _case("expected_attention", "ada"),
    _case("expected_attention", "ada", epsilon=1e-2),
    _case("keydiff", "uniform"),
    _case("keydiff", "ada"),
    _case("knorm", "uniform"),
    _case("knorm", "ada"),
    Case("tova", "uniform", {"kv_policy": "tova"}),
    Case("kvzip", "model", {"kv_policy": "kvzip", **_KVZIP}),
    Case("kvzip_plus", "model", {"kv_policy": "kvzip_plus", **_KVZIP}),
)
CASE_NAMES = [case.name for case in CASES]
SIZES = (Size(ratio=0.5), Size(ratio=0.8), Size(budget=128))
SIZE_NAMES = [size.name for size in SIZES]


@dataclass
class Recorded:
    """The sets that kvpress kept, in a file of packed bits."""

    prompts: list[list[int]]
    """Token ids."""
    shape: tuple[int, int]
    """Layers and KV heads (L, K)."""
    versions: dict[str, str]
    """Versions of the packages that computed the sets, by name."""
    kept: dict[tuple[str, str, int], np.ndarray] = field(default_factory=dict)
    """Kept positions [L, K, T], bool, by the names of case and size and the prompt's index."""

    def save(self, path: Path) -> None:
        about = asdict(self)
        del about["kept"]
        keys = list(self.kept)
        about["keys"] = keys
        arrays: dict[str, Any] = {str(i): np.packbits(self.kept[key]) for i, key in enumerate(keys)}
        np.savez_compressed(path, about=np.array(json.dumps(about)), **arrays)

    @classmethod
    def load(cls, path: Path) -> "Recorded":
        with np.load(path) as file:
            about = json.loads(str(file["about"]))
            keys = [(case, size, index) for case, size, index in about.pop("keys")]
            recorded = cls(**about)
            for i, key in enumerate(keys):
                shape = (*recorded.shape, len(recorded.prompts[key[2]]))
                bits = np.unpackbits(file[str(i)], count=int(np.prod(shape)))
                recorded.kept[key] = bits.reshape(shape).astype(bool)
        return recorded


def num_differing(kept: np.ndarray, want: np.ndarray) -> int:
    """Returns how many positions only one of the two sets keeps; a swapped pair counts once."""
    return max(int((kept & ~want).sum()), int((want & ~kept).sum()))
