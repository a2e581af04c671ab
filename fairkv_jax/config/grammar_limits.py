"""What one schema, regular expression or grammar may take while it is compiled."""

from dataclasses import dataclass

from fairkv_jax.config.checks import check_int, check_number
from fairkv_jax.options import option

_GRAMMARS = "Structured outputs"


@dataclass(frozen=True)
class GrammarLimits:
    """Limits of compiling a grammar.

    Raises:
        ValueError: a limit is too small.
    """

    timeout_s: float = option(
        5.0,
        "Maximum seconds for compiling one schema, regular expression or grammar.",
        name="grammar_timeout",
        group=_GRAMMARS,
    )
    memory_bytes: int = option(
        512 << 20,
        "Maximum bytes of memory for compiling one schema, regular expression or grammar.",
        name="grammar_memory_bytes",
        group=_GRAMMARS,
    )

    def __post_init__(self) -> None:
        check_number("grammar_timeout", self.timeout_s, 0.01)
        check_int("grammar_memory_bytes", self.memory_bytes, 16 << 20)
