"""Published head profiles, and the sizes of the models that they were measured on."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fairkv_jax.plan import CostModel, ModelShape, Profile
from fairkv_jax.profile.published import read_retention

SOURCE = "github.com/aiha-lab/TANGRAM (arXiv 2606.06302), tools/head_group_clustering/cluster_maps"
LICENCE = "Apache-2.0"
SCORERS = {
    "snapkv": "SnapKV", "keydiff": "KeyDiff", "ea": "Expected Attention", "fastkvzip": "FastKVzip"
}  # fmt: skip
"""Names of the scorers by the end of a profile's file name, the least unbalanced one first."""


@dataclass(frozen=True)
class PublishedModel:
    """The sizes of a model, from which the times and bytes of its decode step follow."""

    name: str
    file: str
    """Beginning of the names of its profiles."""
    shape: ModelShape
    """For a mixture of experts, `intermediate_size` adds up all experts of a layer."""
    sliding_layers: int = 0
    """Layers that keep the last `window` tokens in every head, whatever the budget."""
    window: int = 0
    heads_per_unit: int = 1
    """KV heads that were measured together, and that a plan therefore keeps together."""
    experts: int = 1
    experts_per_token: int = 1
    mlp_itemsize: float = 2.0
    """Bytes per weight of the MLPs or experts. All other weights and the KV cache take 2 bytes."""

    @property
    def units(self) -> int:
        """Number of units per layer that a plan places."""
        return self.shape.num_kv_heads // self.heads_per_unit

    def cost(self, devices: int, hardware: str, batch: int) -> CostModel:
        """Derives the cost of a decode step. The experts that the batch selects are read once.

        Tokens are taken to select experts independently and uniformly.
        """
        base = CostModel.of(self.shape, devices, hardware, batch=batch)
        shape = self.shape
        mlp = 3 * shape.num_layers * shape.hidden_size * shape.intermediate_size
        other_bytes = 2 * (shape.rest_params - mlp)
        selected = 1 - (1 - self.experts_per_token / self.experts) ** batch
        mlp_bytes = mlp * self.mlp_itemsize
        read_seconds = base.rest_seconds / base.rest_bytes
        return replace(
            base,
            a_seconds=base.a_seconds * self.heads_per_unit,
            b_seconds_per_token=base.b_seconds_per_token * self.heads_per_unit,
            head_bytes=base.head_bytes * self.heads_per_unit,
            token_bytes=base.token_bytes * self.heads_per_unit,
            rest_bytes=(other_bytes + mlp_bytes) / devices,
            rest_seconds=(other_bytes + mlp_bytes * selected) / devices * read_seconds,
        )

    def lengths(self, kept: np.ndarray) -> np.ndarray:
        """Appends the layers with a sliding window to `kept` [prompts, L, K].

        No figure depends on the order of the layers.
        """
        window = np.full((len(kept), self.sliding_layers, kept.shape[2]), float(self.window))
        return np.concatenate([kept, window], axis=1)


MODELS = (
    PublishedModel(
        "Llama-3.1-8B",
        "llama-3.1-8b-instruct",
        ModelShape(32, 4096, 32, 8, 128, 14336, 128256),
    ),
    PublishedModel(
        "Llama-3.3-70B",
        "llama-3.3-70b-instruct",
        ModelShape(80, 8192, 64, 8, 128, 28672, 128256),
    ),
    PublishedModel(
        "Qwen3-4B",
        "qwen3-4b-instruct-2507",
        ModelShape(36, 2560, 32, 8, 128, 9728, 151936),
    ),
    PublishedModel(
        "Gemma-3-12B",
        "gemma-3-12b-it",
        ModelShape(48, 3840, 16, 8, 256, 15360, 262208),
        sliding_layers=40,
        window=1024,
    ),
    PublishedModel(
        "gpt-oss-20b",
        "gpt-oss-20b",
        ModelShape(24, 2880, 64, 8, 64, 32 * 2880, 201088),
        sliding_layers=12,
        window=128,
        experts=32,
        experts_per_token=4,
        mlp_itemsize=4.25 / 8,
    ),
    PublishedModel(
        "Qwen3-30B-A3B",
        "qwen3-30b-a3b-instruct-2507",
        ModelShape(48, 2048, 32, 4, 128, 128 * 768, 151936),
        heads_per_unit=2,
        experts=128,
        experts_per_token=8,
    ),
)
"""Sizes from the models' own config.json. The experts of gpt-oss are published in MXFP4."""


@dataclass(frozen=True)
class PublishedProfile:
    """The tokens that every KV head kept of some prompts, by one scorer."""

    model: PublishedModel
    scorer: str
    kept: np.ndarray
    """float64 [prompts, L, K], without the layers that have a sliding window."""

    def at(self, mean_kept: int, prompts: slice = slice(None)) -> Profile:
        """Makes a profile of some prompts, scaled so that all prompts together keep `mean_kept`.

        Layers with a sliding window are appended, at the size of their window.
        """
        return Profile.from_samples(
            self.lengths(mean_kept, prompts),
            model=self.model.name,
            policy=self.scorer,
            budget=mean_kept,
            source=SOURCE,
        )

    def lengths(self, mean_kept: int, prompts: slice = slice(None)) -> np.ndarray:
        """Returns the prompts' cached tokens [prompts, L, K], scaled as in `at`."""
        return self.model.lengths((self.kept * (mean_kept / self.kept.mean()))[prompts])


def read_profiles(folder: Path) -> Iterator[PublishedProfile]:
    """Reads `MODEL__SCORER.npz` for all models and scorers that the folder holds.

    Raises:
        ValueError: the folder holds none, or a file has other layers or heads than its model.
    """
    found = False
    for model in MODELS:
        for scorer in SCORERS:
            path = folder / f"{model.file}__{scorer}.npz"
            if not path.exists():
                continue
            found = True
            kept = read_retention(path)
            size = (model.shape.num_layers - model.sliding_layers, model.units)
            if kept.shape[1:] != size:
                raise ValueError(
                    f"{path} has {kept.shape[1]} layers x {kept.shape[2]} heads, but {model.name} "
                    f"has {size[0]} x {size[1]} that keep all tokens"
                )
            yield PublishedProfile(model, scorer, kept)
    if not found:
        raise ValueError(
            f"{folder} holds no profile: put files MODEL__SCORER.npz there, such as "
            f"{MODELS[0].file}__{next(iter(SCORERS))}.npz, of the format retention of "
            "`python -m fairkv_jax.profile import`"
        )
