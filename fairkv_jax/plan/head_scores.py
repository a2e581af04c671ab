"""How much each KV head of a model needs whole prompts: the scores that DuoAttention goes by."""

import json
import math
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any, Self

import numpy as np

VERSION = 1
_FIELDS = "version, model, method, sinks, recent, scores and source"


@dataclass(frozen=True)
class HeadScores:
    """A score per layer and KV head; heads of higher scores keep whole prompts first.

    >>> from fairkv_jax.plan import HeadScores
    >>> scores = HeadScores("toy", "gates", scores=((0.9, 0.1), (0.2, 0.7)), sinks=4, recent=64)
    >>> scores.array.argmax(axis=1).tolist()  # the first head of each layer to keep everything
    [0, 1]
    >>> HeadScores.from_json(scores.to_json()) == scores
    True

    Raises:
        ValueError: the scores are not a rectangular table of finite numbers.
    """

    model: str
    method: str
    """How they were learned: "attention", "gates", or where they were imported from."""
    scores: tuple[tuple[float, ...], ...]
    """[L][K]"""
    sinks: int = 8
    """First tokens that the heads of low scores kept while the scores were learned."""
    recent: int = 32
    """Most recent tokens that they kept."""
    source: str = ""
    """The texts, settings or file that the scores come from."""

    def __post_init__(self) -> None:
        rows = self.scores
        is_table = isinstance(rows, list | tuple) and all(isinstance(r, list | tuple) for r in rows)
        if not is_table or not rows or not rows[0] or len({len(row) for row in rows}) != 1:
            raise ValueError(
                "head scores must be a table [layers][heads] with the same number of heads in "
                "every layer"
            )
        for layer, row in enumerate(rows):
            for head, value in enumerate(row):
                is_number = isinstance(value, int | float) and not isinstance(value, bool)
                if not is_number or not math.isfinite(value):
                    raise ValueError(
                        f"the head score of layer {layer}, head {head} must be a finite number, "
                        f"got {value!r}: learn the scores again"
                    )
        for name in ("sinks", "recent"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name} of head scores must be an integer >= 0, got {value!r}")
        if not self.sinks + self.recent:
            raise ValueError("head scores must leave every head at least one sink or recent token")
        object.__setattr__(self, "scores", tuple(tuple(map(float, row)) for row in rows))

    @property
    def array(self) -> np.ndarray:
        """The scores as float64 [L, K]."""
        return np.array(self.scores)

    def check_model(self, num_layers: int, num_heads: int, model: str = "the model") -> None:
        """Raises ValueError if the scores belong to a model with another number of heads."""
        has = (len(self.scores), len(self.scores[0]))
        if has != (num_layers, num_heads):
            raise ValueError(
                f"the head scores of {self.model or 'an unnamed model'} are for {has[0]} layers x "
                f"{has[1]} KV heads, but {model} has {num_layers} x {num_heads}: learn scores of "
                "this model (python -m fairkv_jax.profile learn)"
            )

    def to_json(self) -> str:
        """Returns a JSON object with the fields' names, and the version of the format."""
        return json.dumps({"version": VERSION, **asdict(self)}) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Parses the format of `to_json`.

        Raises:
            ValueError: the text has another format; the message names the field.
        """
        try:
            record = json.loads(text)
        except ValueError as error:
            raise ValueError(f"head scores must be a JSON object with {_FIELDS}: {error}") from None
        if not isinstance(record, dict) or "scores" not in record:
            raise ValueError(f"head scores must be a JSON object with {_FIELDS}")
        if record.get("version") != VERSION:
            raise ValueError(
                f"head scores of version {record.get('version')!r} cannot be read, only version "
                f"{VERSION}: learn or import them again"
            )
        fields: dict[str, Any] = {"model": "", "method": ""}
        fields |= {key: record[key] for key in cls.__dataclass_fields__ if key in record}
        for key in ("model", "method", "source"):
            if not isinstance(fields.get(key, ""), str):
                raise ValueError(f"{key} of head scores must be a string, got {fields[key]!r}")
        return cls(**fields)


def shipped_head_scores(model: str) -> HeadScores | None:
    """Returns the head scores of a model that this package contains, or None.

    >>> from fairkv_jax.plan import shipped_head_scores
    >>> shipped_head_scores("SmolLM2-135M-Instruct").array.shape  # [L, K]
    (30, 3)
    """
    file = resources.files("fairkv_jax.plan") / "profiles" / f"{model}.head_scores.json"
    return HeadScores.from_json(file.read_text(encoding="utf-8")) if file.is_file() else None
