"""The head profile: the expected number of cached tokens of one row per KV head."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any, Self

import numpy as np

from fairkv_jax.plan.shape import ModelShape

FORMAT = "a profile must be a JSON object with model, policy, budget and tokens"
Table = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Profile:
    """Expected cached tokens per layer and KV head, and their origin.

    Profiles are hashable: tables are nested tuples. `array` returns `tokens` as float64 [L, K].

    >>> from fairkv_jax.plan import Profile
    >>> profile = Profile("toy", "ada_snapkv", budget=300, tokens=[[900, 100, 100, 100]])
    >>> profile.array.shape
    (1, 4)

    Raises:
        ValueError: a table is not rectangular, or a value is not positive and finite.
    """

    model: str
    policy: str
    budget: int | None
    """Mean kept tokens per head, including the window; None if every token is kept."""
    tokens: Table
    """Expected cached tokens, positive, [L, K]."""
    spread: Table | None = None
    """Standard deviation of `tokens` over the prompts, [L, K]."""
    samples: tuple[Table, ...] | None = None
    """Kept tokens of each prompt, [prompts, L, K]."""
    prompt_tokens: float | None = None
    """Mean length of the prompts, or the prompt length for which a table was imported."""
    correlation: float | None = None
    """Mean correlation of the kept tokens between two prompts, over layers and heads."""
    held_out: tuple[tuple[str, float], ...] = ()
    """Utilization of each strategy on prompts that were left out of the profile."""
    source: str = ""
    """How the profile was made."""
    shape: ModelShape | None = None
    """The model's sizes, which determine the cost of a head's weights."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", _table("tokens", self.tokens, positive=True))
        whole = isinstance(self.budget, int) and not isinstance(self.budget, bool)
        if self.budget is not None and not (whole and self.budget > 0):
            raise ValueError(
                f"the profile's budget must be a positive integer or null, got {self.budget!r}"
            )
        size = (len(self.tokens), len(self.tokens[0]))
        if self.spread is not None:
            object.__setattr__(self, "spread", _table("spread", self.spread, size=size))
        if self.samples is not None:
            tables = tuple(
                _table(f"samples[{i}]", sample, size=size) for i, sample in enumerate(self.samples)
            )
            object.__setattr__(self, "samples", tables)
        if self.shape is not None and size != (self.shape.num_layers, self.shape.num_kv_heads):
            raise ValueError(
                f"the profile has {size[0]} layers x {size[1]} heads, but its shape says "
                f"{self.shape.num_layers} x {self.shape.num_kv_heads}"
            )

    @classmethod
    def uniform(cls, num_layers: int, num_heads: int, tokens: float) -> Self:
        """Returns a profile in which all heads hold the same number of tokens."""
        table = ((float(tokens),) * num_heads,) * num_layers
        return cls(model="", policy="uniform", budget=None, tokens=table, source="uniform")

    @classmethod
    def from_samples(cls, samples: np.ndarray, **fields: Any) -> Self:
        """Makes a profile of measured lengths `samples` [prompts, L, K]."""
        samples = np.asarray(samples, np.float64)
        if samples.ndim != 3 or not len(samples):
            raise ValueError(
                f"measured lengths must have the shape [prompts, layers, heads] with at least one "
                f"prompt, got {list(samples.shape)}"
            )
        return cls(
            tokens=samples.mean(0).tolist(),
            spread=samples.std(0).tolist(),
            samples=tuple(samples.tolist()),
            correlation=prompt_correlation(samples),
            **fields,
        )

    @property
    def num_layers(self) -> int:
        return len(self.tokens)

    @property
    def num_heads(self) -> int:
        return len(self.tokens[0])

    @property
    def array(self) -> np.ndarray:
        """`tokens` as float64 [L, K]."""
        return np.array(self.tokens)

    def check_model(self, num_layers: int, num_heads: int, model: str = "the model") -> None:
        """Raises ValueError if the profile belongs to a model with another number of heads."""
        if (self.num_layers, self.num_heads) != (num_layers, num_heads):
            raise ValueError(
                f"the profile of {self.model or 'an unnamed model'} has {self.num_layers} layers x "
                f"{self.num_heads} KV heads, {model} has {num_layers} x {num_heads}: "
                "measure a profile for this model (python -m fairkv_jax.profile)"
            )

    def to_json(self) -> str:
        """Returns a JSON object with the fields' names; empty fields are left out."""
        record = {k: v for k, v in asdict(self).items() if v not in (None, (), "")}
        record |= {"model": self.model, "policy": self.policy, "budget": self.budget}
        record["tokens"] = self.tokens
        if self.held_out:
            record["held_out"] = dict(self.held_out)
        return json.dumps(record) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Parses the format of `to_json`; only model, policy, budget and tokens are required.

        Raises:
            ValueError: the text is not a valid profile; the message names the invalid field.
        """
        record = _object(text)
        missing = [key for key in ("model", "policy", "budget", "tokens") if key not in record]
        if missing:
            raise ValueError(f"the profile lacks {', '.join(missing)}: {FORMAT}")
        for key in ("model", "policy"):
            if not isinstance(record[key], str):
                raise ValueError(f"the profile's {key} must be a string, got {record[key]!r}")
        known = {key: record[key] for key in cls.__dataclass_fields__ if key in record}
        for key in ("shape", "held_out"):
            if not isinstance(known.get(key, {}), Mapping):
                raise ValueError(f"the profile's {key} must be an object, got {known[key]!r}")
        if "shape" in known:
            known["shape"] = ModelShape.from_record(known["shape"])
        if "held_out" in known:
            known["held_out"] = tuple(known["held_out"].items())
        return cls(**known)


def shipped_profile(model: str, policy: str) -> Profile | None:
    """Returns the profile of a model and policy that this package contains, or None.

    >>> from fairkv_jax.plan import shipped_profile
    >>> shipped_profile("SmolLM2-135M-Instruct", "ada_snapkv").array.shape  # [L, K]
    (30, 3)
    >>> shipped_profile("SmolLM2-135M-Instruct", "snapkv") is None
    True
    """
    file = resources.files("fairkv_jax.plan") / "profiles" / f"{model}.{policy}.json"
    return Profile.from_json(file.read_text(encoding="utf-8")) if file.is_file() else None


def prompt_correlation(samples: np.ndarray) -> float | None:
    """Returns the mean Pearson correlation over all pairs of prompts, `samples` [prompts, L, K].

    Returns None with fewer than two prompts that keep different numbers of tokens per head.
    """
    flat = samples.reshape(len(samples), -1)
    flat = flat - flat.mean(1, keepdims=True)
    norms = np.linalg.norm(flat, axis=1)
    flat = flat[norms > 0] / norms[norms > 0, None]
    pairs = len(flat) * (len(flat) - 1)
    return float((np.sum(flat.sum(0) ** 2) - len(flat)) / pairs) if pairs else None


def _object(text: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"the profile is not JSON ({error}): {FORMAT}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{FORMAT}, got {type(record).__name__}")
    return record


def _table(
    name: str, rows: Any, *, positive: bool = False, size: tuple[int, int] | None = None
) -> Table:
    """Returns `rows` as nested tuples and checks that they are rectangular and non-negative."""
    if not isinstance(rows, list | tuple) or not rows or not all(_is_row(row) for row in rows):
        raise ValueError(f"the profile's {name} must be a table of numbers, [layers][heads]")
    widths = {len(row) for row in rows}
    if len(widths) != 1 or 0 in widths:
        raise ValueError(
            f"every layer of the profile's {name} must have the same number of heads, at least 1, "
            f"got {sorted(widths)}"
        )
    if size is not None and (len(rows), len(rows[0])) != size:
        raise ValueError(
            f"the profile's {name} must have the size of its tokens, {size[0]} x {size[1]}, "
            f"got {len(rows)} x {len(rows[0])}"
        )
    for layer, row in enumerate(rows):
        for head, value in enumerate(row):
            if not math.isfinite(value) or value < 0 or (positive and value == 0):
                raise ValueError(
                    f"the profile's {name} at layer {layer}, head {head} is {value}: it must be "
                    f"{'positive' if positive else 'at least 0'} and finite"
                )
    return tuple(tuple(float(value) for value in row) for row in rows)


def _is_row(row: Any) -> bool:
    return isinstance(row, list | tuple) and all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in row
    )
