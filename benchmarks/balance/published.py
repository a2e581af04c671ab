"""Published head profiles and head scores, and the sizes of the models that they belong to."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from fairkv_jax.compress.budgets import budgets_per_head
from fairkv_jax.config import KVConfig
from fairkv_jax.plan import SHAPES, CostModel, HeadScores, ModelShape, Profile
from fairkv_jax.profile.published import from_headkv, read_retention, read_table

SOURCE = "github.com/aiha-lab/TANGRAM (arXiv 2606.06302), tools/head_group_clustering/cluster_maps"
LICENCE = "Apache-2.0"
SCORERS = {
    "snapkv": "SnapKV", "keydiff": "KeyDiff", "ea": "Expected Attention", "fastkvzip": "FastKVzip"
}  # fmt: skip
"""Names of the scorers by the end of a profile's file name, the least unbalanced one first."""
SCORES_SOURCE = (
    "github.com/mit-han-lab/duo-attention (arXiv 2410.10819), attn_patterns, MIT, and "
    "github.com/FYYFU/HeadKV (arXiv 2410.19258), Important_Head/head_score"
)
DUO_ATTENTION = "duo_attention"
HEADKV = {"retrieval": "HeadKV retrieval scores", "retrieval_reasoning": "HeadKV reasoning scores"}
"""Names of HeadKV's scores by the kind of heads in their file names."""
HEAD_SCORES = {DUO_ATTENTION: "DuoAttention scores"} | {
    f"headkv_{kind}": name for kind, name in HEADKV.items()
}
NAMES = SCORERS | HEAD_SCORES
"""Names of all scorers and head scores as the records call them."""
RATIO = 0.8
"""The fraction of a prompt that budgets from head scores drop."""
HEADKV_BUDGET = 2048
"""Mean tokens per head for which HeadKV's scores are turned into budgets."""


@dataclass(frozen=True)
class PublishedModel:
    """The sizes of a model, from which the times and bytes of its decode step follow."""

    name: str
    file: str
    """The model in the names of its files."""
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
    def budget_layers(self) -> int:
        """Number of layers that hold the budget, and no sliding window."""
        return self.shape.num_layers - self.sliding_layers

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
_LLAMA_3, _MISTRAL = SHAPES["llama-3-8b"], ModelShape(32, 4096, 32, 8, 128, 14336, 32000)
SCORED_MODELS = (
    PublishedModel("Llama-3.1-8B", "Meta-Llama-3.1-8B-Instruct", SHAPES["llama-3.1-8b"]),
    PublishedModel("Llama-3-8B", "Meta-Llama-3-8B-Instruct", _LLAMA_3),
    PublishedModel("Llama-3-8B-1048k", "Llama-3-8B-Instruct-Gradient-1048k", _LLAMA_3),
    PublishedModel("Llama-3-8B-4194k", "Llama-3-8B-Instruct-Gradient-4194k", _LLAMA_3),
    PublishedModel("Mistral-7B-v0.2", "Mistral-7B-Instruct-v0.2", _MISTRAL),
    PublishedModel(
        "Mistral-7B-v0.3", "Mistral-7B-Instruct-v0.3", replace(_MISTRAL, vocab_size=32768)
    ),
    PublishedModel(
        "Llama-2-7B-32K",
        "Llama-2-7B-32K-Instruct",
        ModelShape(32, 4096, 32, 32, 128, 11008, 32000),
    ),
)
"""Models that head scores were published of. Llama-2 has a KV head per query head."""


@dataclass(frozen=True)
class Published(ABC):
    """What the KV heads of a model keep, by one scorer or by one table of head scores."""

    model: PublishedModel
    scorer: str
    scales: ClassVar[bool]
    """Whether every head's share of the budget is the same at all budgets."""

    @abstractmethod
    def lengths(self, mean_kept: int, prompts: slice = slice(None)) -> np.ndarray:
        """Returns the cached tokens [prompts, L, K] at a mean over all prompts of `mean_kept`.

        Layers with a sliding window are appended. Budgets that all prompts get are one prompt.
        """

    def at(self, mean_kept: int, prompts: slice = slice(None)) -> Profile:
        """Makes a profile of the lengths of some prompts."""
        return Profile.from_samples(
            self.lengths(mean_kept, prompts),
            model=self.model.name,
            policy=self.scorer,
            budget=mean_kept,
            source=SOURCE if self.scorer in SCORERS else SCORES_SOURCE,
        )


@dataclass(frozen=True)
class PublishedProfile(Published):
    """The tokens that every KV head kept of some prompts, scaled to a budget."""

    kept: np.ndarray
    """float64 [prompts, L, K], without the layers that have a sliding window."""
    scales = True

    def lengths(self, mean_kept: int, prompts: slice = slice(None)) -> np.ndarray:
        return self.model.lengths((self.kept * (mean_kept / self.kept.mean()))[prompts])


@dataclass(frozen=True)
class DuoAttentionScores(Published):
    """The budgets that the engine gives heads by DuoAttention's scores at a ratio.

    These are those of `kv_policy="duo_attention"` and `kv_ratio=0.8`. A head either keeps its whole
    prompt or sinks and recent tokens, whose number is fixed: the longer the prompt, the less even.
    """

    scores: HeadScores
    scales = False

    def lengths(self, mean_kept: int, prompts: slice = slice(None)) -> np.ndarray:
        config = KVConfig(policy=self.scorer, ratio=RATIO, head_scores=self.scores)
        layers, heads = self.model.budget_layers, self.model.units
        budgets = budgets_per_head(config, round(mean_kept / (1 - RATIO)), layers, heads)
        return np.array([budgets], float)[prompts]


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
            _check_size(path, kept[0], model, model.units)
            yield PublishedProfile(model, scorer, kept)
    if not found:
        raise ValueError(
            f"{folder} holds no profile: put files MODEL__SCORER.npz there, such as "
            f"{MODELS[0].file}__{next(iter(SCORERS))}.npz, of the format retention of "
            "`python -m fairkv_jax.profile import`"
        )


def read_scores(folder: Path) -> Iterator[Published]:
    """Reads the head scores of all models of `SCORED_MODELS` that the folder holds.

    DuoAttention's are in `duoattention_MODEL.tsv`, HeadKV's in `headkv_MODEL_KIND_heads.tsv`.
    HeadKV's budgets are those of `HEADKV_BUDGET`, scaled to others, since its window of 8 tokens
    hardly changes the heads' shares.

    Raises:
        ValueError: the folder holds none, or a file has other layers or heads than its model.
    """
    found = False
    for model in SCORED_MODELS:
        path = folder / f"duoattention_{model.file}.tsv"
        if path.exists():
            found = True
            table = read_table(path)
            _check_size(path, table, model, model.units)
            # The sinks and recent tokens of the paper's evaluation, as in `from_duo_attention`.
            scores = HeadScores(model.name, DUO_ATTENTION, table.tolist(), sinks=128, recent=256)
            yield DuoAttentionScores(model, DUO_ATTENTION, scores)
        for kind in HEADKV:
            path = folder / f"headkv_{model.file}_{kind}_heads.tsv"
            if not path.exists():
                continue
            found = True
            table = read_table(path)
            _check_size(path, table, model, model.shape.num_heads)
            profile = from_headkv(
                table,
                num_kv_heads=model.units,
                budget=HEADKV_BUDGET,
                prompt_tokens=round(HEADKV_BUDGET / (1 - RATIO)),
            )
            yield PublishedProfile(model, f"headkv_{kind}", profile.array[None])
    if not found:
        raise ValueError(
            f"{folder} holds no head scores: put files duoattention_MODEL.tsv or "
            f"headkv_MODEL_KIND_heads.tsv there, such as duoattention_{SCORED_MODELS[0].file}.tsv, "
            "of the formats of `python -m fairkv_jax.profile import`"
        )


def _check_size(path: Path, table: np.ndarray, model: PublishedModel, heads: int) -> None:
    """Raises ValueError if a table [L, heads] is not of the model."""
    if table.shape != (model.budget_layers, heads):
        raise ValueError(
            f"{path} has {table.shape[0]} layers x {table.shape[1]} heads, but {model.name} "
            f"has {model.budget_layers} x {heads} that keep all tokens"
        )
