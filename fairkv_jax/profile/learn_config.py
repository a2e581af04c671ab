"""The options of `python -m fairkv_jax.profile learn`."""

from dataclasses import dataclass

from fairkv_jax.options import option

METHODS = ("attention", "gates")
_LEARNING = "Learning"
_TEXTS = "Texts"


@dataclass(frozen=True)
class LearnConfig:
    """How head scores are learned, and from which texts.

    Raises:
        ValueError: an option lies outside its limits.
    """

    method: str = option(
        "attention",
        "attention: the attention that a head pays to an answer in the context while the model "
        "repeats it. gates: DuoAttention's gates between full attention and attention to the "
        "first and most recent tokens, trained with Adam.",
        group=_LEARNING,
        choices=METHODS,
    )
    steps: int = option(60, "Training steps of the method gates.", group=_LEARNING)
    l1: float = option(
        1.0,
        "Weight of the mean gate in the loss of the method gates: a larger one closes more gates.",
        group=_LEARNING,
    )
    sinks: int = option(
        8, "First tokens of a context that a closed gate lets through.", group=_LEARNING
    )
    recent: int = option(
        32, "Most recent tokens of a context that a closed gate lets through.", group=_LEARNING
    )
    num_contexts: int = option(40, "Number of contexts.", group=_TEXTS)
    context_tokens: int = option(
        512, "Tokens of a context, including the facts that are planted in it.", group=_TEXTS
    )
    haystack: str | None = option(
        None,
        "Path of a text file whose words surround the facts.",
        group=_TEXTS,
        default_text="Python's language reference",
    )
    seed: int = option(0, "Random seed of the contexts.", group=_TEXTS)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        limits = {"steps": 1, "sinks": 0, "recent": 0, "num_contexts": 1, "context_tokens": 1}
        for name, low in limits.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if not 0 <= self.l1 < float("inf"):
            raise ValueError(f"l1 must be a finite number of at least 0, got {self.l1}")
        if 2 * (self.sinks + self.recent) > self.context_tokens:
            raise ValueError(
                f"sinks {self.sinks} and recent {self.recent} are more than half of context_tokens "
                f"{self.context_tokens}: lower them, or use longer contexts"
            )
