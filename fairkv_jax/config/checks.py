"""Checks of options that several configurations share."""

import math
from numbers import Integral, Real


def check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def check_int(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < low:
        raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_fraction(name: str, value: float, *, closed: bool) -> None:
    """Checks 0 <= value <= 1, or 0 <= value < 1 where `closed` is false."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not (0 <= value <= 1 if closed else 0 <= value < 1):
        raise ValueError(f"{name} must lie in [0, 1{']' if closed else ')'}, got {value!r}")


def check_optional_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value is not None:
        check_choice(name, value, choices)


def check_number(name: str, value: float, low: float) -> None:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not low <= value < math.inf:
        raise ValueError(f"{name} must be a finite number of at least {low}, got {value!r}")
