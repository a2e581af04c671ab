"""Options declared once, as dataclass fields that carry their help text.

    @dataclass(frozen=True)
    class CacheConfig:
        page_size: int = option(16, "Tokens per page.", group="Memory")

    options_of(CacheConfig)     everything that flags, keyword arguments and tables derive from
    split_options(values, ...)  keyword arguments as the fields of the dataclasses that declare them

Standard library only: the planner and the tools read options without importing JAX.
"""

import difflib
import inspect
import textwrap
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache, wraps
from typing import Any, TypeVar

_KEY = "option"
_SAME = object()
_T = TypeVar("_T")


@dataclass(frozen=True)
class Option:
    """One option, as users see it."""

    name: str
    """The keyword argument; the flag is the same with dashes."""
    field: str
    """The dataclass field that stores the value."""
    type: type
    """str, int, float, bool, or tuple for a list of strings."""
    default: Any
    """None if the value is chosen when it is needed; `default_text` then says how."""
    help: str
    group: str
    choices: tuple[str, ...]
    default_text: str
    old_name: str | None
    """The deprecated name, which is still accepted."""

    @property
    def old_field(self) -> str | None:
        """The deprecated name of the dataclass field."""
        prefix = self.name.removesuffix(self.field)
        return self.old_name and self.old_name.removeprefix(prefix)

    @property
    def shown_default(self) -> str:
        """The default value in words; empty if the option is unset by default."""
        if self.default_text:
            return self.default_text
        if isinstance(self.default, tuple):
            return ",".join(self.default)
        return "" if self.default is None else str(self.default)


def option(
    default: Any,
    help: str,
    *,
    group: str,
    name: str | None = None,
    type: type | None = None,
    user_default: Any = _SAME,
    default_text: str = "",
    choices: tuple[str, ...] = (),
    old_name: str | None = None,
) -> Any:
    """Declares a dataclass field that is an option.

    Args:
        default: the default of the dataclass field.
        help: complete sentences for users who do not know the code.
        group: the heading under which `--help` lists the option.
        name: the name that users write, if it differs from the field's.
        type: the type that a flag takes, if the field's annotation is not it.
        user_default: the default for users, if it differs from the field's; None means that
            the value is chosen when it is needed.
        default_text: describes the default, where the value alone does not.
        choices: the values that are accepted; empty: any.
        old_name: a deprecated name, which is still accepted.
    """
    declared = {
        "name": name,
        "type": type,
        "default": default if user_default is _SAME else user_default,
        "help": help,
        "group": group,
        "choices": choices,
        "default_text": default_text,
        "old_name": old_name,
    }
    return field(default=default, metadata={_KEY: declared})


@cache
def options_of(*classes: type) -> tuple[Option, ...]:
    """Returns the options that these dataclasses declare, in the order of their fields."""
    found = []
    for cls in classes:
        hints = typing.get_type_hints(cls)
        for each in fields(cls):
            declared = each.metadata.get(_KEY)
            if declared is None:
                continue
            name = declared["name"] or each.name
            kind = declared["type"] or _value_type(hints[each.name])
            found.append(Option(**{**declared, "name": name, "type": kind, "field": each.name}))
    return tuple(found)


def _value_type(hint: Any) -> type:
    """Returns `int` for `int | None`, and `tuple` for `tuple[str, ...]`."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        (hint,) = (each for each in typing.get_args(hint) if each is not types.NoneType)
    return typing.get_origin(hint) or hint


def by_group(options: Iterable[Option]) -> dict[str, list[Option]]:
    """Returns the options under their groups, in the order in which the groups appear."""
    groups: dict[str, list[Option]] = {}
    for each in options:
        groups.setdefault(each.group, []).append(each)
    return groups


def split_options(values: Mapping[str, Any], *classes: type) -> list[dict[str, Any]]:
    """Returns the values for each dataclass, by the names of its fields.

    A value of None is left out if it means that the value is chosen when it is needed.

    Raises:
        TypeError: a name is unknown.
    """
    known = [each.name for each in options_of(*classes)]
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(known)}"
            raise TypeError(f"unknown option {name!r}: {hint}")
    return [
        {
            each.field: values[each.name]
            for each in options_of(cls)
            if each.name in values and not (each.default is None and values[each.name] is None)
        }
        for cls in classes
    ]


def with_new_names(
    values: Mapping[str, Any], options: Iterable[Option], *, stacklevel: int = 1
) -> dict[str, Any]:
    """Replaces deprecated names by the new ones, and warns.

    Args:
        stacklevel: where the warning points: 1 is the code that calls this function, 2 its caller.

    Raises:
        ValueError: an option is given under both names.
    """
    renamed = {each.old_name: each.name for each in options if each.old_name}
    return _rename(values, renamed, stacklevel + 2)


def _rename(
    values: Mapping[str, Any], renamed: Mapping[str, str], stacklevel: int
) -> dict[str, Any]:
    result = {name: value for name, value in values.items() if name not in renamed}
    for old in values:
        if old in renamed:
            new = renamed[old]
            check_given_once(old, new, result)
            warnings.warn(deprecation(old, new), DeprecationWarning, stacklevel=stacklevel)
            result[new] = values[old]
    return result


def check_given_once(old: str, new: str, given: Iterable[str]) -> None:
    """Raises ValueError if the new name of an option is given beside its deprecated one."""
    if new in given:
        raise ValueError(f"{old} is the deprecated name of {new}: give {new} only")


def deprecation(old: str, new: str) -> str:
    """Returns the warning about a deprecated name."""
    return f"{old} is deprecated and will be removed in the next release: use {new}"


def accept_old_names(cls: type[_T]) -> type[_T]:
    """Class decorator: the constructor also accepts the deprecated names of fields, and warns."""
    init: Any = cls.__init__
    renamed = {each.old_field: each.field for each in options_of(cls) if each.old_field}

    @wraps(init)
    def accept(self: _T, *args: Any, **values: Any) -> None:
        init(self, *args, **_rename(values, renamed, 3))

    cls.__init__ = accept
    return cls


def document_options(*classes: type) -> Callable[[type[_T]], type[_T]]:
    """Class decorator: `{options}` in the docstring becomes the list of the options."""

    def document(cls: type[_T]) -> type[_T]:
        if cls.__doc__:
            text = inspect.cleandoc(cls.__doc__)
            cls.__doc__ = text.replace("{options}", as_text(options_of(*classes)))
        return cls

    return document


def as_text(options: Iterable[Option], width: int = 100) -> str:
    """Returns the options as the entries of a docstring, by group."""
    lines = []
    for group, members in by_group(options).items():
        lines.append(f"{group}:")
        for each in members:
            text = f"{each.name}: {help_with_default(each)}"
            lines += textwrap.wrap(
                text,
                width,
                initial_indent=" " * 4,
                subsequent_indent=" " * 8,
                break_on_hyphens=False,
            )
    return "\n".join(lines)


def help_with_choices(option: Option) -> str:
    """Returns the help text, and the choices if it does not name them."""
    if all(choice in option.help for choice in option.choices):
        return option.help
    return f"{option.help} One of {', '.join(option.choices)}."


def help_with_default(option: Option) -> str:
    """Returns the help text, the choices if it does not name them, and the default."""
    return f"{help_with_choices(option)} Default: {option.shown_default or 'none'}."
